"""``dsbench calibrate``: whether the simulator tells the truth about this machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import uvloop
from rich.console import Console

from dsbench import compared, host
from dsbench.compared import Compared
from dsbench.contention import Factors, find
from dsbench.load import Load, Progress
from dsbench.objectives import objectives
from dsbench.predict import Prediction
from dsbench.probe import Constants, constants, probe
from dsbench.serve import Measurement, measure
from dsbench.served import Served
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target
from dsctl.profile import profile_of, wanted_by
from dsobserve.terminal import output
from dsplan.profile import check_topology
from dsplan.profile import load as load_profile
from dsplan.profiling import MOST_TOKENS, Effort
from dssim.model import layout_of
from dssim.records import Record
from dssim.times import LinearTimes, linear_times
from dssim.wish import METAVAR, Wish, make
from dstopology.load import load
from dstopology.resolved import Slo, Topology
from dswire.errors import BadInput

#: rates of the runs, in parts of the rate at which the objectives are just met
FACTORS = (0.5, 0.8, 1.0, 1.2, 1.5)
#: ... and the part of it at which it is found how much instances slow each other down
BUSY = 0.9
#: a rate is measured for so many requests, however long that takes
LEAST_REQUESTS = 30


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
    "--duration", type=click.FloatRange(1), default=30.0, show_default=True, help="Seconds of each rate, at least."
)
@click.option("--warmup", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds before that.")
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
    goodput: tuple[str, ...],
    attainment: float | None,
    profile: Path | None,
    seed: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Profile this machine, predict, then run the real system at five rates, and compare.

    Each topology is started, probed for what steps and messages cost in it, loaded, and stopped. Prefill, decode,
    router and this program share the machine's cores: give the instances one thread each where there are two.

    \b
    dsbench calibrate -f T.yaml --goodput "ttft:800 tpot:80" --plot truth.png
    dsbench calibrate -f disaggregated.yaml -f colocated.yaml --workload fixed:128,64 --json
    """
    if plot is not None:
        from dssim.plot import check

        check()
    topologies = [load(file) for file in files]
    slo = objectives(goodput, topologies[0].slo, attainment)
    wish = Wish(workload, None, seed=seed, until_s=warmup + duration)
    chosen = None if rates is None else _rates(rates)
    console = Console(stderr=True)
    host.warn(console)
    path, _ = profile_of(wanted_by(topologies[0]), profile, False, Effort(), MOST_TOKENS, console)
    rows: list[Compared] = []
    for topology in topologies:
        for row in Calibration(topology, path, slo, wish, warmup, console).rows(chosen):
            rows.append(row)
            console.print(
                f"{row.system}, {row.rate:.2f}/s: predicted {row.predicted.attainment.value:.1%}, "
                f"measured {row.measured.attainment.value:.1%}"
            )
    if plot is not None:
        compared.save(rows, plot)
    if as_json:
        click.echo(json.dumps(compared.plain(rows, slo), indent=2))
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
class Calibration:
    """One topology."""

    topology: Topology
    #: of the engine alone
    profile: Path
    slo: Slo
    wish: Wish
    warmup_s: float
    console: Console

    @property
    def mine(self) -> Path:
        """The profile with what was found beyond the engine."""
        return self.profile.with_suffix(f".{self.topology.path.stem}.json")

    @property
    def prediction(self) -> Prediction:
        """By what is known so far."""
        return Prediction(self.topology, self.mine, self.slo)

    def rows(self, rates: list[float] | None) -> Iterator[Compared]:
        """Start, probe, load for a while, then each rate predicted and measured."""
        check_topology(self.profile, self.topology)
        with started(self.topology.path, self.console):
            target = find_target(self.topology.path, None, None)
            found = self.probe(target)
            _write(self.profile, self.mine, found, {})
            if _neighbours(self.topology):
                self.contend(target, found, BUSY * (median(rates) if rates else self.knee()))
            if not rates:
                knee = self.knee()
                rates = [knee * factor for factor in FACTORS]
            for rate in rates:
                wish = self._at(rate)
                predicted = self.prediction.served(wish, self.warmup_s)
                measured, _ = self._measure(target, wish)
                yield Compared(self.topology.path.stem, rate, predicted, measured)

    def probe(self, target: Target) -> Constants:
        """What is needed beyond the engine."""
        decoding = len(self.topology.role("decode"))

        async def ask() -> Constants:
            async with AsyncClient(target.address, keys=target.keys) as client:
                seen = await probe(client, self.console.print, decoding=decoding)
            return constants(seen, _alone(self.topology, self.profile), layout_of(self.topology))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(ask())
        self.console.print(f"beyond the engine: {json.dumps(_rounded(found))}", soft_wrap=True)
        return found

    def contend(self, target: Target, found: Constants, rate: float) -> None:
        """How much the instances slow each other down at that rate, by arrivals of their own."""
        wish = replace(self._at(rate), seed=self.wish.seed + 1)
        self.console.print(f"{rate:.2f} requests/s, to see how much instances slow each other down")
        _, sent = self._measure(target, wish)

        def predict(factors: Factors) -> Sequence[Record]:
            _write(self.profile, self.mine, found, factors)
            return self.prediction.records(make(wish))

        factors = find(sent.records, predict)
        _write(self.profile, self.mine, found, factors)
        told = ", ".join(f"{phase} {factor:.2f}" for phase, factor in factors.items())
        self.console.print(f"a step beside others takes so many times as long: {told}")

    def knee(self) -> float:
        """The rate at which the objectives are just met, as predicted."""
        rate = self.prediction.knee(replace(self.wish, until_s=float("inf")))
        self.console.print(f"the objectives are predicted to hold up to {rate:.2f} requests/s")
        return rate

    def _at(self, rate: float) -> Wish:
        until_s = max(self.wish.until_s, self.warmup_s + LEAST_REQUESTS / rate)
        return replace(self.wish, rate=rate, until_s=until_s)

    def _measure(self, target: Target, wish: Wish) -> tuple[Served, Progress]:
        load = Load(make(wish))
        return measure(Measurement(target, load, self.slo, self.warmup_s, wish.rate or 0.0), self.console)


def _neighbours(topology: Topology) -> bool:
    """Whether any node has more than one instance."""
    nodes = [one.node for one in topology.instances]
    return len(nodes) > len(set(nodes))


def _alone(topology: Topology, profile: Path) -> LinearTimes:
    """Times of the engine alone: of the instances that read prompts, and of those that decode."""
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


def _write(profile: Path, to: Path, found: Constants, factors: Factors) -> None:
    """The profile with what was found, for the simulator."""
    document = load_profile(profile)
    document.transfer, document.beside = found.transfer, factors
    for fit in document.fits.values():
        fit["overhead"] = found.overhead
    document.save(to)
