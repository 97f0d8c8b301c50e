"""``dsbench calibrate``: whether the simulator tells the truth about this machine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import uvloop
from rich.console import Console

from dsbench import compared, host
from dsbench.compared import Compared
from dsbench.load import Load
from dsbench.objectives import objectives
from dsbench.predict import Prediction
from dsbench.probe import Constants, constants, probe
from dsbench.serve import Measurement, measure
from dsbench.started import started
from dsclient import AsyncClient
from dsctl.asking import Target, find_target
from dsctl.profile import profile_of, wanted_by
from dsplan.profile import check_topology
from dsplan.profile import load as load_profile
from dsplan.profiling import MOST_TOKENS, Effort
from dssim.model import layout_of
from dssim.times import LinearTimes, linear_times
from dssim.wish import METAVAR, Wish, make
from dstopology.load import load
from dstopology.resolved import Slo, Topology
from dswire.errors import BadInput

#: rates of the runs, in parts of the rate at which the objectives are just met
FACTORS = (0.5, 0.8, 1.0, 1.2, 1.5)
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
        for row in run(topology, path, slo, wish, warmup, chosen, console):
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
        compared.show(Console(width=None if sys.stdout.isatty() else 1000, highlight=False), rows, slo)


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise BadInput(f"--rates {text!r} is not understood", remedy="write 1,2,3.5")
    return found


def run(
    topology: Topology,
    profile: Path,
    slo: Slo,
    wish: Wish,
    warmup_s: float,
    rates: list[float] | None,
    console: Console,
) -> Iterator[Compared]:
    """One topology: start, probe, then each rate predicted and measured."""
    check_topology(profile, topology)
    with started(topology.path, console):
        target = find_target(topology.path, None, None)
        found = _probe(topology, profile, target, console)
        mine = profile.with_suffix(f".{topology.path.stem}.json")
        _write(profile, mine, found)
        prediction = Prediction(topology, mine, slo)
        knee = 0.0 if rates else prediction.knee(replace(wish, until_s=float("inf")))
        if not rates:
            console.print(f"the objectives are predicted to hold up to {knee:.2f} requests/s")
        for rate in rates or [knee * factor for factor in FACTORS]:
            until_s = max(wish.until_s, warmup_s + LEAST_REQUESTS / rate)
            here = replace(wish, rate=rate, until_s=until_s)
            predicted = prediction.served(here, warmup_s)
            measurement = Measurement(target, Load(make(here)), slo, warmup_s, rate)
            measured, _ = measure(measurement, console)
            yield Compared(topology.path.stem, rate, predicted, measured)


def _probe(topology: Topology, profile: Path, target: Target, console: Console) -> Constants:
    decoding = len(topology.role("decode"))

    async def ask() -> Constants:
        async with AsyncClient(target.address, keys=target.keys) as client:
            seen = await probe(client, console.print, decoding=decoding, apart=topology.mode == "disaggregated")
        return constants(seen, _alone(topology, profile), layout_of(topology))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(ask())
    console.print(f"beyond the engine: {json.dumps(_rounded(found))}", soft_wrap=True)
    return found


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
        "beside": {phase: round(factor, 3) for phase, factor in found.beside.items()},
    }


def _write(profile: Path, to: Path, found: Constants) -> None:
    """The profile with what was found, for the simulator."""
    document = load_profile(profile)
    document.transfer, document.beside = found.transfer, found.beside
    for fit in document.fits.values():
        fit["overhead"] = found.overhead
    document.save(to)
