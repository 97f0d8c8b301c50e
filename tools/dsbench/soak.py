"""``dsbench soak``: many small requests through a whole system, some left on the way, and what is held afterwards.

Nothing is told from a single look: every process is looked at when the system is idle behind a first part of the
requests, by which time every pool, cache and socket has been used, and again when it is idle behind the last one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsbench import host
from dsbench.endured import Endured, Look
from dsbench.footprint import footprint
from dsbench.hammer import Hammer
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target
from dsctl.overview import overview
from dsctl.topology import FILE_HELP
from dsobserve.terminal import output
from dstopology.load import find, load
from dstopology.resolved import Topology
from dswire.errors import BadInput, Failed
from dswire.messages.client import StatusReport

#: part of the requests behind which the first look is taken
WARM_UP = 0.2
#: longest wait for the system to be idle, and between two looks whether it is
IDLE_S, LOOK_S = 30.0, 0.25


@click.command("soak")
@click.option("-f", "--file", type=click.Path(path_type=Path), help=FILE_HELP)
@click.option("--start", is_flag=True, help="Start the topology's processes for the measurement, and stop them.")
@click.option("--requests", type=click.IntRange(10), default=10_000, show_default=True)
@click.option("--at-once", type=click.IntRange(1), default=16, show_default=True, help="Requests under way.")
@click.option(
    "--leave",
    type=click.FloatRange(0, 1),
    default=0.15,
    show_default=True,
    help="Share that is cancelled.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, and of who is cancelled when.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    file: Path | None, start: bool, requests: int, at_once: int, leave: float, seed: int, as_json: bool
) -> None:
    """Send many small requests, and see that nothing of them stays: memory, KV blocks, files, threads.

    Prompts of 4 to 64 tokens, some behind 32 that others begin with too; answers of up to 24 tokens. Those that are
    cancelled are left before the first token or behind any later one. The exit status is 5 if the memory of a
    process grew by more than 16 MiB after the first fifth of the requests, if one has more files open or more
    threads, if blocks, handles or requests are held when nothing is asked any more, or if a request failed.

    \b
    dsbench soak -f T.yaml --start
    dsbench soak --requests 500 --leave 0.5 --json
    """
    path, console = find(file), Console(stderr=True)
    topology, target = load(path), find_target(path, None, None)
    host.warn(console)
    with started(path, console) if start else nullcontext():
        hammer = Hammer(requests, at_once, leave, topology.model.max_model_len, seed)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("requests", total=requests)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                endured = runner.run(_soak(topology, target, hammer, lambda: progress.advance(task)))
    if as_json:
        click.echo(json.dumps(endured.as_json(), indent=2))
    else:
        show(endured)
    if endured.failures:
        raise Failed(f"{path}: after {requests} requests, " + "; ".join(endured.failures))


async def _soak(topology: Topology, target: Target, hammer: Hammer, on_end: Callable[[], None]) -> Endured:
    async with AsyncClient(target.address, keys=target.keys) as client:
        first = int(hammer.requests * WARM_UP)
        await hammer.run(client, first, on_end)
        await _idle(client)
        warm = await asyncio.to_thread(_look, topology)
        await hammer.run(client, hammer.requests - first, on_end)
        held = await _idle(client)
        end = await asyncio.to_thread(_look, topology)
    return Endured(
        requests=hammer.requests,
        counted=hammer.requests - first,
        left=hammer.left,
        failed=dict(hammer.failed),
        seconds=hammer.seconds,
        warm=warm,
        end=end,
        held=held,
    )


async def _idle(client: AsyncClient) -> dict[str, int]:
    """Wait until nothing is held; what still is after :data:`IDLE_S`. Words from before the wait do not count."""
    began_s, held = time.monotonic(), {"router: unheard workers": 1}
    for _ in range(int(IDLE_S / LOOK_S)):
        report = await client.status()
        if max(one.report_age_s for one in report.workers) < time.monotonic() - began_s:
            held = holds(report)
        if not held:
            break
        # workers tell once a second, and nobody tells that they have told
        await asyncio.sleep(LOOK_S)
    return held


def holds(report: StatusReport) -> dict[str, int]:
    """What workers hold for some request: name of the thing -> how many, zeros left out."""
    found = {f"router: {phase} requests": count for phase, count in report.requests.items()}
    for one in report.workers:
        for thing, count in (
            ("blocks", one.blocks_held),
            ("requests that wait", one.waiting),
            ("requests that run", one.running),
            *((f"{state} handles", count) for state, count in one.handles.items()),
        ):
            found[f"{one.name}: {thing}"] = count
    return {thing: count for thing, count in found.items() if count}


def _look(topology: Topology) -> Look:
    """Raises :class:`BadInput` where no supervisor of this host runs it."""
    seen = overview(topology.path)
    if seen.supervisor_pid is None:
        raise BadInput(f"no supervisor of this host runs {topology.path}", remedy="start it, or say --start")
    processes = {row.name: footprint(row.pid) for row in seen.rows if row.pid is not None}
    restarts = sum(row.restarts or 0 for row in seen.rows)
    segments = sum(1 for _ in topology.shm_dir.glob(f"ds-{topology.digest}-*"))
    return Look(processes, segments, restarts)


def show(endured: Endured) -> None:
    """A table, and the verdict in a sentence."""
    table = Table(title=f"{endured.requests} requests, {endured.left} of them left on the way")
    for name in ("process", "own memory, MiB", "growth", "per 1,000 requests, KiB", "files", "threads"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for name, before, after in endured.pairs():
        growth = after.private_nbytes - before.private_nbytes
        table.add_row(
            name,
            f"{after.private_nbytes / 2**20:.1f}",
            f"{growth / 2**20:+.2f}",
            f"{growth / 2**10 / max(endured.counted / 1000, 1e-9):+.1f}",
            _change(before.files, after.files),
            _change(before.threads, after.threads),
        )
    output().print(table)
    rate = endured.requests / endured.seconds
    held = ", ".join(f"{count} {thing}" for thing, count in endured.held.items()) or "nothing"
    output().print(f"{rate:.0f} requests/s; held when idle: {held}", highlight=False)


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} -> {after}"
