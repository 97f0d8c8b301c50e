"""``dsbench kv``: how fast KV is handed over, beside what the machine allows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TypeAlias

import click
import msgspec
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsbench import host
from dsbench.handoff import limits
from dsbench.handoff.ends import LAYOUT
from dsbench.handoff.measure import Copies, Cost, Crowd, Limit, Transfer, Verification, cost, crowd, transfers
from dsbench.handoff.whole import HandOff, Overlap, hand_off, overlap, system
from dsbench.handoff.world import World, world
from dskv.segment import Segment
from dskv.stream import RECORD_NBYTES
from dsobserve.terminal import output
from dswire.errors import Failed

Row: TypeAlias = Transfer | Verification | Cost | Crowd | HandOff | Overlap
#: tokens of the prompt that a whole system hands over
TOKENS = 512
#: and of one that is read in steps
LONG_TOKENS = 2048
STEP_TOKENS = 512


@click.command("kv")
@click.option(
    "--transport",
    type=click.Choice(["shm", "host", "gloo"]),
    multiple=True,
    help="May be said several times; default: shm and host.",
)
@click.option("--curve", is_flag=True, help="Also with encryption between the nodes.")
@click.option(
    "--mib", "sizes", type=click.IntRange(1, 4096), multiple=True, help="Size of a hand-off; default: 16, 64."
)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--handles", type=click.IntRange(2, 4096), default=1000, show_default=True, help="Wanted at once.")
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Of the whole system.")
@click.option("--system/--no-system", "whole", default=True, help="Also start a whole system.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and figure, on standard output.")
def command(
    transport: tuple[str, ...],
    curve: bool,
    sizes: tuple[int, ...],
    rounds: int,
    handles: int,
    model: str,
    whole: bool,
    as_json: bool,
) -> None:
    """Hand KV over between real processes: owner, relays, reader.

    \b
    shm    one node: the reader copies straight out of the owner's pool; the limit is memcpy of the same bytes.
           `copy` is that without the messages that lead to it
    host   two nodes on this host's loopback: owner's pool, TCP, reader's pool; the limit is a blocking
           socket that carries the same bytes, and with --curve libsodium's box over them, in one thread
    gloo   the same two nodes, by a communicator of torch.distributed; the limit is the socket

    Every figure is the median of rounds in which it and its limit take turns. At last a whole system of one prefill
    and one decode instance hands prompts of 512 tokens over, one by one; its ledger tells how long that took. So do
    two others by streams with prompts of 2,048 tokens, one in parts while the prompt is read and one at its end.

    \b
    dsbench kv
    dsbench kv --transport host --curve --mib 64 --no-system --json
    """
    console = Console(stderr=True)
    host.warn(console)
    plan = [(name, on) for name in transport or ("shm", "host") for on in ([False, True] if curve else [False])]
    # shared memory is not encrypted, only the words about it are, and communicators cannot be
    plan = [(name, on) for name, on in plan if name == "host" or not on]
    rows: list[Row] = []
    with (
        Progress(console=console, transient=True) as progress,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        task = progress.add_task("", total=len(plan) * (len(sizes or (16, 64)) + 2) + 2 * whole)

        def add(row: Row) -> None:
            progress.advance(task)
            rows.append(row)
            if as_json:
                click.echo(json.dumps(msgspec.to_builtins(row)))

        async def run(name: str, on: bool) -> None:
            progress.update(task, description=f"{name}{' with CURVE' if on else ''}")
            async for row in _measure(name, on, sizes or (16, 64), rounds, handles):
                add(row)

        for name, on in plan:
            runner.run(run(name, on))
        if whole:
            progress.update(task, description="whole systems")
            for row in _whole(model, rounds):
                add(row)
    if not as_json:
        for made in _tables(rows):
            output().print(made)
    console.print(f"load average at the end: {host.load():.2f}")


async def _measure(
    transport: str, curve: bool, sizes: Sequence[int], rounds: int, handles: int
) -> AsyncIterator[Row]:
    blocks = max(sizes) * (1 << 20) // LAYOUT.block_nbytes
    async with world(transport, blocks, curve=curve) as running:
        source = Segment.open(
            running.topology.instance("prefill-0").segment, blocks, LAYOUT.block_nbytes, writable=True
        )
        limit = _limit(running, transport, curve, source)
        for mib in sizes:
            if transport == "shm":
                handle = (await running.offer(1, max(1, (mib << 20) // LAYOUT.block_nbytes)))[0]
                copies = Copies(running.reader, source)
                yield copies.run(handle, rounds)
                yield copies.verification(handle, rounds)
            yield await transfers(running, transport, curve, mib << 20, rounds, limit)
        yield await cost(running, transport, curve, 20 * rounds)
        yield await crowd(running, transport, curve, handles, 8, max(1, rounds // 5))


def _whole(model: str, rounds: int) -> Iterator[Row]:
    """Of whole systems, with an engine."""
    with system(model, TOKENS) as client:
        yield hand_off(client, TOKENS, 2 * rounds)
    with (
        system(model, LONG_TOKENS, step=STEP_TOKENS, overlap="on") as parts,
        system(model, LONG_TOKENS, step=STEP_TOKENS) as pieces,
    ):
        yield overlap(parts, pieces, LONG_TOKENS, STEP_TOKENS, max(1, rounds // 2))


def _limit(running: World, transport: str, curve: bool, source: Segment) -> Limit:
    pool = running.reader.pool
    target, origin = limits.address(pool), limits.address(source)
    if transport == "shm":
        return lambda nbytes: limits.memcpy_s(target, origin, nbytes)
    if not curve:
        mine, theirs = memoryview(pool.buffer), memoryview(source.buffer)
        return lambda nbytes: limits.socket_s(mine[:nbytes], theirs[:nbytes])
    box = limits.box(RECORD_NBYTES)
    if box is None:
        raise Failed(
            "there is no libsodium to compare with",
            remedy="install pyzmq's own wheel or the system's libsodium, or leave --curve out",
        )
    return lambda nbytes: box.seconds(origin, nbytes)


def _tables(rows: Sequence[Row]) -> list[Table]:
    speed = Table("transport", "CURVE", "MiB", "ms", "GB/s", "limit GB/s", "of the limit", title="hand-offs")
    proofs = Table("MiB", "ms", "unverified ms", "overhead", title="verifying a copy (median)")
    costs = Table("transport", "CURVE", "µs to pull", "µs of that to copy", title="one block (median)")
    crowds = Table("transport", "CURVE", "handles at once", "a second", "8 at once", "ratio", title="many at once")
    whole = Table("prompt tokens", "hand-off ms", "of which", title="a whole system (median)")
    parts = Table("prompt tokens", "a step", "hand-off ms", "in one piece", "hidden", title="in parts (median)")
    for row in rows:
        match row:
            case Transfer():
                speed.add_row(*_transfer(row))
            case Verification():
                took = (f"{row.seconds * 1e3:.2f}", f"{row.seconds_unverified * 1e3:.2f}")
                proofs.add_row(f"{row.bytes / (1 << 20):.0f}", *took, f"{row.overhead:.1%}")
            case Cost():
                copied = "-" if row.copy_us is None else f"{row.copy_us:.0f}"
                costs.add_row(row.transport, _on(row.curve), f"{row.pull_us:.0f}", copied)
            case Crowd():
                rates = (f"{row.handles_per_s:,.0f}", f"{row.handles_per_s_few:,.0f}", f"{row.ratio:.2f}x")
                crowds.add_row(row.transport, _on(row.curve), str(row.handles), *rates)
            case HandOff():
                stages = (f"{stage.removesuffix('_s')} {ms:.2f}" for stage, ms in row.stages_ms.items())
                whole.add_row(str(row.prompt_tokens), f"{row.hand_off_ms:.2f}", ", ".join(stages))
            case Overlap():
                took = (f"{row.hand_off_ms:.2f}", f"{row.hand_off_whole_ms:.2f}")
                parts.add_row(str(row.prompt_tokens), str(row.step_tokens), *took, f"{row.hidden:.0%}")
    return [made for made in (speed, proofs, costs, crowds, whole, parts) if made.row_count]


def _transfer(row: Transfer) -> tuple[str, ...]:
    colour = "green" if row.ratio >= 0.8 else "yellow" if row.ratio >= 0.5 else "red"
    return (
        *(row.transport, _on(row.curve), f"{row.bytes / (1 << 20):.0f}", f"{row.seconds * 1e3:.2f}"),
        *(f"{row.bytes_per_s / 1e9:.2f}", f"{row.limit_bytes_per_s / 1e9:.2f}"),
        f"[{colour}]{row.ratio:.0%}[/]",
    )


def _on(curve: bool) -> str:
    return "on" if curve else "off"
