"""``dsctl simulate``: how a topology would do under a workload, by the real schedulers under a virtual clock."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.topology import file_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from dssim.records import Record, Run
    from dssim.workload import Arrival
    from dstopology.resolved import Slo, Topology

_SLO = re.compile(r"(ttft|tpot):([0-9]+(?:\.[0-9]+)?)")


@click.command()
@file_option
@click.option(
    "--workload",
    default="sharegpt",
    show_default=True,
    metavar="WHAT",
    help="sharegpt, humaneval, longbench, fixed:IN,OUT, a .csv or .jsonl file, like:FILE or "
    "servegen:RATES,LENGTHS; docs/workloads.md tells of each.",
)
@click.option("--rate", type=float, help="Requests a second; needed unless a file tells when they arrive.")
@click.option("--requests", type=click.IntRange(1, 10_000_000), help="How many; default all of a file, or 500.")
@click.option(
    "--arrival", type=click.Choice(["poisson", "gamma", "constant"]), default="poisson", show_default=True
)
@click.option("--cv", type=float, default=1.0, show_default=True, help="Burstiness of gamma arrivals.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same run.")
@click.option("--slo", metavar="ttft:MS,tpot:MS", help="Objectives; default those of the topology.")
@click.option(
    "--profile",
    default="opt-13b-a100",
    show_default=True,
    metavar="NAME|FILE",
    help="How long steps and transfers take: DistServe's published OPT-13B times, or a file of `dsctl profile`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write distributions and timelines (.png, .svg, .pdf)."
)
@click.option("--trace", type=click.Path(path_type=Path), help="Write a trace for Perfetto or chrome://tracing.")
def command(
    file: Path | None,
    workload: str,
    rate: float | None,
    requests: int | None,
    arrival: str,
    cv: float,
    seed: int,
    slo: str | None,
    profile: str,
    as_json: bool,
    plot: Path | None,
    trace: Path | None,
) -> None:
    """Simulate a topology under a workload: TTFT, TPOT, and how many requests meet both objectives.

    The schedulers are the servers' own; only the time of steps and transfers is modelled, by --profile. KV sizes
    are those of the topology's model, which must be on this host.

    \b
    dsctl simulate -f T.yaml --workload sharegpt --rate 2 --slo ttft:250,tpot:100
    dsctl simulate -f T.yaml --workload mine.csv --trace run.json
    """
    from dssim import plot as plots
    from dssim.wish import Wish, make
    from dstopology.load import find, load

    if plot is not None:
        plots.check()
    topology = load(find(file))
    objectives = parse_slo(slo, topology.slo)
    arrivals = make(Wish(workload, rate, requests, arrival, cv, seed))
    run = _simulate(topology, arrivals, profile, keep_steps=trace is not None)
    _write_trace(run, trace)
    if plot is not None:
        plots.save(run, objectives, plot)
    _show(run, objectives, topology, as_json)


def parse_slo(text: str | None, default: Slo) -> Slo:
    """Objectives as ``ttft:MS,tpot:MS``; what is left out is the topology's. Raises :class:`BadInput`."""
    from dataclasses import replace

    from dswire.errors import BadInput

    wanted: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        found = _SLO.fullmatch(part.strip())
        if found is None or found[1] in wanted or float(found[2]) <= 0:
            raise BadInput(f"--slo {text!r}: {part!r} is not understood", remedy="write ttft:250,tpot:100, in ms")
        wanted[found[1]] = float(found[2]) / 1e3
    return replace(default, ttft_s=wanted.get("ttft", default.ttft_s), tpot_s=wanted.get("tpot", default.tpot_s))


def _simulate(topology: Topology, arrivals: list[Arrival], profile: str, *, keep_steps: bool) -> Run:
    from dsplan.profile import check_topology
    from dssim.model import layout_of
    from dssim.system import System
    from dssim.times import linear_times, transfer_times

    check_topology(Path(profile), topology)
    system = System(
        topology,
        layout_of(topology),
        lambda instance: linear_times(profile, instance.tp),
        transfer_times(profile),
        keep_steps=keep_steps,
    )
    with _progress(len(arrivals)) as advance:
        return system.run(arrivals, advance)


@contextmanager
def _progress(requests: int) -> Iterator[Callable[[Record], None]]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("", total=requests)
        progress.disable = not sys.stderr.isatty()
        yield lambda record: progress.advance(task)


def _write_trace(run: Run, path: Path | None) -> None:
    if path is None:
        return
    from dssim.trace import chrome
    from dswire.errors import BadInput

    try:
        path.write_text(json.dumps(chrome(run)))
    except OSError as error:
        raise BadInput(f"the trace cannot be written to {path}: {error.strerror}") from error


def _show(run: Run, slo: Slo, topology: Topology, as_json: bool) -> None:
    from dsctl import simulated
    from dssim.statistics import summarize

    summary = summarize(run.records, slo, run.simulated_s)
    if as_json:
        click.echo(json.dumps(simulated.data(run, summary, slo), indent=2))
    else:
        simulated.show(run, summary, slo, len(topology.instances))
