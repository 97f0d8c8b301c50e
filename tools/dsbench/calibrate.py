"""``dsbench calibrate``: whether the simulator tells the truth about this machine.

Two rules: a prediction knows nothing of the loads that it foretells but their arrivals and the machine's pace
beside them; and all rates are measured in alternating rounds, since a machine that others share has bad minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import click
import uvloop
from rich.console import Console

from dsbench import compared, host, noise
from dsbench.compared import Compared
from dsbench.contention import Factors, find
from dsbench.disturbance import Watch
from dsbench.load import Load, Progress
from dsbench.objectives import objectives
from dsbench.predict import Known, Prediction
from dsbench.probe import Constants, Pace, ask_pace, constants, messages, pace, probe
from dsbench.rounds import Load as Taken
from dsbench.rounds import Tried, Turn, in_a_row, pooled, turns, undisturbed
from dsbench.serve import Measurement, measure
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target
from dsctl.profile import profile_of, wanted_by
from dsctl.supervise.rundir import RunDir
from dsobserve.terminal import output
from dsplan.profile import check_topology
from dsplan.profiling import MOST_TOKENS, Effort
from dssim.model import layout_of
from dssim.records import Record
from dssim.times import LinearTimes, linear_times
from dssim.wish import METAVAR, Wish, make
from dstopology.load import load
from dstopology.resolved import Slo, Topology
from dswire.errors import BadInput

T = TypeVar("T")

#: rates of the runs, in parts of the rate at which the objectives are just met
FACTORS = (0.5, 0.8, 1.0, 1.2, 1.5)
#: ... and the part of it at which it is found how much instances slow each other down
BUSY = 0.9
#: a rate is measured for so many requests, all rounds together, however long that takes
LEAST_REQUESTS = 30
#: simulations of each load, which differ by chance alone
DRAWS = 5


@click.command("calibrate")
@click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A topology; more follow.",
)
@click.option("--workload", default="humaneval", show_default=True, metavar=METAVAR)
@click.option("--rates", help="Requests a second, with commas; default five around the predicted knee.")
@click.option(
    "--duration",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    help="Seconds of each rate, at least, all rounds together.",
)
@click.option(
    "--warmup", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds before each load."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Each runs all rates, in another order."
)
@click.option(
    "--disturbed",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Share of the cores' time, taken by the host or by other processes, above which a load is run again.",
)
@click.option(
    "--repeats", type=click.IntRange(0), default=2, show_default=True, help="So many times at most, for each load."
)
@click.option(
    "--goodput", multiple=True, metavar="ttft:MS tpot:MS", help="Objectives; default the first topology's."
)
@click.option(
    "--attainment", type=click.FloatRange(0, 1), help="Share that must meet both; default the topology's."
)
@click.option("--profile", type=click.Path(path_type=Path), help="Of `dsctl profile`; what it lacks is measured.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it (.png, .svg, .pdf).")
def command(
    files: tuple[Path, ...],
    workload: str,
    rates: str | None,
    duration: float,
    warmup: float,
    rounds: int,
    disturbed: float,
    repeats: int,
    goodput: tuple[str, ...],
    attainment: float | None,
    profile: Path | None,
    seed: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Profile this machine, predict, then run the real system at five rates, and compare.

    Each topology is started, probed for what steps and messages cost in it, loaded in rounds, and stopped. Prefill,
    decode, router and this program share the machine's cores: give the instances one thread each where there are
    two. Before and after each load a few single requests tell how fast the machine is just then.

    \b
    dsbench calibrate -f T.yaml --goodput "ttft:800 tpot:80" --plot truth.png
    dsbench calibrate -f disaggregated.yaml -f colocated.yaml --workload fixed:128,64 --json
    dsbench calibrate -f T.yaml --rates 2,4,6 --rounds 5 --disturbed 0.02 --repeats 4
    """
    if plot is not None:
        from dssim.plot import check

        check()
    topologies = [load(file) for file in files]
    slo = objectives(goodput, topologies[0].slo, attainment)
    wish = Wish(workload, None, seed=seed, until_s=duration)
    plan = Plan(rounds, warmup, disturbed, repeats)
    chosen = None if rates is None else _rates(rates)
    console = Console(stderr=True)
    host.warn(console)
    path, _ = profile_of(wanted_by(topologies[0]), profile, False, Effort(), MOST_TOKENS, console)
    rows: list[Compared] = []
    for topology in topologies:
        for row in Calibration(topology, path, slo, wish, plan, console).rows(chosen):
            rows.append(row)
            console.print(
                f"{row.system}, {row.rate:.2f}/s: predicted {row.predicted.attainment.value:.1%}, "
                f"measured {row.measured.attainment.value:.1%}"
            )
    if plot is not None:
        compared.save(rows, plot)
    if as_json:
        click.echo(json.dumps(compared.plain(rows, slo, warmup), indent=2))
    else:
        compared.show(output(), rows, slo)


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise BadInput(f"--rates {text!r} is not understood", remedy="write 1,2,3.5")
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """How it is measured."""

    rounds: int
    #: before each load
    warmup_s: float
    #: see :class:`dsbench.disturbance.Disturbance`; the loads that exceed it are repeated so many times
    bound: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """One topology."""

    topology: Topology
    #: of the engine alone
    profile: Path
    slo: Slo
    #: ``until_s``: of each rate, all rounds together
    wish: Wish
    plan: Plan
    console: Console

    @property
    def mine(self) -> Path:
        """The profile with what was found beyond the engine."""
        return self.profile.with_suffix(f".{self.topology.path.stem}.json")

    @property
    def prediction(self) -> Prediction:
        """By what is known so far."""
        return Prediction(self.topology, self.mine, self.slo)

    def rows(self, rates: Sequence[float] | None) -> Iterator[Compared]:
        """Start, probe, load for a while, then all rates in rounds; a row for each rate."""
        check_topology(self.profile, self.topology)
        with started(self.topology.path, self.console):
            target = find_target(self.topology.path, None, None)
            known = Known(self.profile, self.mine, self.probe(target))
            known.write()
            self.contend(target, known, BUSY * (median(rates) if rates else self.knee()))
            if not rates:
                knee = self.knee()
                rates = [knee * factor for factor in FACTORS]
            taken = [self.take(target, known, turn) for turn in turns(rates, self.plan.rounds, self.wish.seed)]
            known.write()
        for rate in rates:
            yield self.row(rate, [one for one in taken if one.turn.rate == rate])

    def probe(self, target: Target) -> Constants:
        """What is needed beyond the engine."""
        decoding = len(self.topology.role("decode"))
        seen = _ask(target, lambda client: probe(client, self.console.print, decoding=decoding))
        found = constants(seen, _times(self.topology, self.profile), layout_of(self.topology))
        self.console.print(f"beyond the engine: {json.dumps(_rounded(found))}", soft_wrap=True)
        return found

    def pace(self, target: Target) -> Pace:
        """How fast the machine is just now, beside what :meth:`probe` found."""
        return pace(_ask(target, ask_pace), _times(self.topology, self.mine))

    def contend(self, target: Target, known: Known, rate: float) -> None:
        """How much instances slow each other down at that rate, what messages cost, and how much is left to chance.

        By arrivals of their own, in as many loads as there will be rounds, each at its own pace.
        """
        self.console.print(f"{rate:.2f} requests/s, to see how much instances slow each other down")
        rounds, seed = self.plan.rounds, self.wish.seed
        wishes = [replace(self._at(rate, rounds), seed=seed - 1 - number) for number in range(rounds)]
        loads = [(wish, self._undisturbed(target, known, wish)) for wish in wishes]
        for _, (tried, tries, _) in loads:
            self.console.print(compared.machine(tried, tries), highlight=False)
        measured = in_a_row(tried.records for _, (tried, _, _) in loads)

        def predict(factors: Factors) -> list[Record]:
            known.beside = factors
            return in_a_row([self._predicted(known, wish, tried.pace) for wish, (tried, _, _) in loads])

        if _neighbours(self.topology):
            known.beside = find(measured, predict, _times(self.topology, self.profile))
            told = ", ".join(f"{phase} {factor:.2f}" for phase, factor in known.beside.items())
            self.console.print(f"a step beside others takes so many times as long: {told}")
        known.constants = replace(known.constants, transfer=known.constants.transfer | messages(measured))
        known.noise = noise.factors(measured, predict(known.beside), _times(self.topology, self.profile))
        known.write()
        self.console.print(
            f"a step takes so many times as long as foretold, p10/p50/p90/p99: {noise.told(known.noise)}"
        )

    def knee(self) -> float:
        """The rate at which the objectives are just met, as predicted."""
        rate = self.prediction.knee(replace(self.wish, until_s=float("inf")))
        self.console.print(f"the objectives are predicted to hold up to {rate:.2f} requests/s")
        return rate

    def take(self, target: Target, known: Known, turn: Turn) -> Taken:
        """One rate of a round: measured, again where it was disturbed, and predicted at the pace that was seen."""
        wish = replace(self._at(turn.rate, self.plan.rounds), seed=self.wish.seed + turn.round)
        tried, tries, disturbed = self._undisturbed(target, known, wish)
        predicted = [self._predicted(known, wish, tried.pace, draw) for draw in range(DRAWS)]
        taken = Taken(turn, tried, tries, disturbed, predicted)
        self.console.print(compared.told(taken, self.slo, self.plan.warmup_s), highlight=False, soft_wrap=True)
        return taken

    def row(self, rate: float, taken: Sequence[Taken]) -> Compared:
        """All rounds of a rate."""
        late_s, warmup_s = max(one.tried.late_s for one in taken), self.plan.warmup_s
        runs = [run for one in taken for run in one.predicted]
        predicted = pooled(runs, self.slo, warmup_s, rate, 0.0)
        measured = pooled([one.tried.records for one in taken], self.slo, warmup_s, rate, late_s)
        return Compared(self.topology.path.stem, rate, predicted, measured, tuple(taken))

    def _predicted(self, known: Known, wish: Wish, pace: Pace, draw: int = 0) -> tuple[Record, ...]:
        known.write(pace)
        return self.prediction.records(make(wish), draw)

    def _undisturbed(self, target: Target, known: Known, wish: Wish) -> tuple[Tried, int, bool]:
        return undisturbed(lambda: self._try(target, known, wish), self.plan.bound, self.plan.repeats)

    def _try(self, target: Target, known: Known, wish: Wish) -> Tried:
        known.write()
        before = self.pace(target)
        watch = Watch(self._roots())
        sent = self._measure(target, wish)
        disturbance = watch.end()
        after = self.pace(target)
        return Tried(sent.records, disturbance, before.between(after), sent.latest_s)

    def _roots(self) -> list[int]:
        holder = RunDir(self.topology.run_dir).holder()
        return [os.getpid()] if holder is None else [os.getpid(), holder.pid]

    def _at(self, rate: float, parts: int) -> Wish:
        """Of each of the rounds that a rate's time is cut into."""
        return replace(
            self.wish,
            rate=rate,
            until_s=self.plan.warmup_s + max(self.wish.until_s, LEAST_REQUESTS / rate) / parts,
        )

    def _measure(self, target: Target, wish: Wish) -> Progress:
        load = Load(make(wish))
        _, sent = measure(Measurement(target, load, self.slo, self.plan.warmup_s, wish.rate or 0.0), self.console)
        return sent


def _ask(target: Target, question: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with AsyncClient(target.address, keys=target.keys) as client:
            return await question(client)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(ask())


def _neighbours(topology: Topology) -> bool:
    """Whether any node has more than one instance."""
    nodes = [one.node for one in topology.instances]
    return len(nodes) > len(set(nodes))


def _times(topology: Topology, profile: Path) -> LinearTimes:
    """Times by a profile: of the instances that read prompts, and of those that decode."""
    decode = linear_times(str(profile), topology.role("decode")[0].tp)
    reading = topology.role("prefill") or topology.role("decode")
    return replace(decode, prefill=linear_times(str(profile), reading[0].tp).prefill)


def _rounded(found: Constants) -> dict[str, object]:
    return {
        "message_ms": round(found.transfer["local_message_s"] * 1e3, 3),
        "client_ms": round(found.transfer["network_message_s"] * 1e3, 3),
        "steps_ms": {
            phase: {name.removesuffix("_ms"): round(value, 3) for name, value in parts.items()}
            for phase, parts in found.overhead.items()
        },
    }
