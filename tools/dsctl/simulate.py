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

from dsctl.options import PLOTS, NewFile, arrival_options, workload_option, wrote
from dsctl.topology import file_option
from dsobserve.files import writing

if TYPE_CHECKING:
    from collections.abc import Callable

    from dssim.failure import Failure
    from dssim.rates import AtRate
    from dssim.records import Record, Run
    from dssim.statistics import Summary
    from dssim.wish import Wish
    from dssim.workload import Arrival
    from dstopology.resolved import Slo, Topology

#: exit status when not one request was answered
UNANSWERED = 5
_SLO = re.compile(r"(ttft|tpot):([0-9]+(?:\.[0-9]+)?)")


@click.command()
@file_option
@workload_option("sharegpt")
@arrival_options
@click.option("--rate", type=float, help="Requests a second; needed unless a file tells when they arrive.")
@click.option("--rates", metavar="FROM:TO:STEP", help="Several rates, one after the other; also A,B,C.")
@click.option("--requests", type=click.IntRange(1, 10_000_000), help="How many; default all of a file, or 500.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same run.")
@click.option("--slo", metavar="ttft:MS,tpot:MS", help="Objectives; default those of the topology.")
@click.option(
    "--profile",
    default="opt-13b-a100",
    show_default=True,
    metavar="NAME|FILE",
    help="How long steps and transfers take: DistServe's published OPT-13B times, or a file of `dsctl profile`.",
)
@click.option(
    "--fail",
    "failures",
    multiple=True,
    metavar="NAME@T[+D]",
    help="A process dies T seconds after the beginning, and is back D seconds later; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    type=NewFile("plot", *PLOTS),
    help="Write distributions and timelines, or with --rates the curves over them (.png, .svg, .pdf).",
)
@click.option("--trace", type=NewFile("trace"), help="Write a trace for Perfetto or chrome://tracing.")
def command(
    file: Path | None,
    workload: str,
    rate: float | None,
    rates: str | None,
    requests: int | None,
    arrival: str,
    cv: float,
    seed: int,
    slo: str | None,
    profile: str,
    failures: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    trace: Path | None,
) -> int:
    """Simulate a topology under a workload: TTFT, TPOT, and how many requests meet both objectives.

    The schedulers are the servers' own; only the time of steps and transfers is modelled, by --profile. KV sizes
    are those of the topology's model, which must be on this host. The exit status is 5 when no request is answered.

    \b
    dsctl simulate -f T.yaml --workload sharegpt --rate 2 --slo ttft:250,tpot:100
    dsctl simulate -f T.yaml --workload mine.csv --trace run.json
    dsctl simulate -f T.yaml --rates 1:10:1 --requests 2000 --plot curve.png
    dsctl simulate -f T.yaml --rate 4 --fail decode-0@12.5s+3s
    """
    from dssim import failure
    from dssim import plot as plots
    from dssim import rates as sweep
    from dssim.statistics import summarize
    from dssim.wish import Wish, make
    from dstopology.load import find, load
    from dswire.errors import BadInput

    if plot is not None:
        plots.check()
    if rates is not None and (rate is not None or trace is not None):
        raise BadInput("--rates goes with neither --rate nor --trace", remedy="leave one of them out")
    topology = load(find(file))
    title = f"{topology.path.name}, {workload}"
    objectives = parse_slo(slo, topology.slo)
    simulator = _Simulator(topology, profile, failure.parse(failures, topology), seed)
    if rates is not None:
        wishes = [Wish(workload, one, requests, arrival, cv, seed) for one in sweep.parse(rates)]
        runs = _sweep(simulator, wishes, objectives)
        if plot is not None:
            plots.save_rates(runs, objectives, plot, title)
            wrote(plot)
        _show_rates(runs, objectives, simulator.about, as_json)
        return 0 if any(one.summary.finished for one in runs) else UNANSWERED
    arrivals = make(Wish(workload, rate, requests, arrival, cv, seed))
    with _progress(len(arrivals)) as advance:
        inside = plot is not None or trace is not None
        run = simulator.run(arrivals, advance, inside=inside, keep_steps=trace is not None)
    _write_trace(run, trace)
    if plot is not None:
        plots.save(run, objectives, plot, title if rate is None else f"{title}, {rate:g} requests/s")
        wrote(plot)
    summary = summarize(run.records, objectives, run.simulated_s)
    _show(run, summary, objectives, topology, simulator.about, as_json)
    return 0 if summary.finished else UNANSWERED


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


class _Simulator:
    """What does not change from rate to rate."""

    def __init__(self, topology: Topology, profile: str, failures: tuple[Failure, ...], seed: int) -> None:
        from dsplan.profile import check_topology
        from dssim.times import about

        check_topology(Path(profile), topology)
        self._topology = topology
        self._profile = profile
        self._failures = failures
        #: of chance in the times of steps, where the profile tells of any
        self._seed = seed
        #: whose times of steps these are
        self.about = about(profile, topology.model.name)

    def run(
        self,
        arrivals: list[Arrival],
        on_end: Callable[[Record], None],
        *,
        inside: bool = False,
        keep_steps: bool = False,
    ) -> Run:
        """One run; compiled where nothing but records is wanted, nothing fails, and that gives the same."""
        from dssim.profiled import express, system_of

        found = None if inside or self._failures else express(self._topology, self._profile, arrivals)
        if found is not None:
            for record in found.records:
                on_end(record)
            return found
        system = system_of(self._topology, self._profile, seed=self._seed, keep_steps=keep_steps)
        return system.run(arrivals, on_end, self._failures)


def _sweep(simulator: _Simulator, wishes: list[Wish], slo: Slo) -> list[AtRate]:
    """A run for each rate."""
    from dssim.rates import AtRate
    from dssim.statistics import summarize
    from dssim.wish import make

    workloads = [make(wish) for wish in wishes]
    runs: list[AtRate] = []
    with _progress(sum(len(one) for one in workloads)) as advance:
        for wish, arrivals in zip(wishes, workloads, strict=True):
            run = simulator.run(arrivals, advance)
            runs.append(AtRate(wish.rate or 0.0, run, summarize(run.records, slo, run.simulated_s)))
    return runs


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

    with writing("trace", path):
        path.write_text(json.dumps(chrome(run)))
    wrote(path)


def _show(run: Run, summary: Summary, slo: Slo, topology: Topology, about: str, as_json: bool) -> None:
    from dsctl import simulated

    if as_json:
        click.echo(json.dumps({"times": about} | simulated.data(run, summary, slo), indent=2))
    else:
        simulated.show(run, summary, slo, len(topology.instances), about)


def _show_rates(runs: list[AtRate], slo: Slo, about: str, as_json: bool) -> None:
    from dsctl import simulated

    if as_json:
        click.echo(json.dumps({"times": about} | simulated.data_rates(runs, slo), indent=2))
    else:
        simulated.show_rates(runs, slo, about)
