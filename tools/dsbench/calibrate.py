"""``dsbench calibrate``: whether the simulator tells the truth about this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from dsbench import compared, host
from dsbench.calibration import Calibration, Plan
from dsbench.compared import Compared
from dsbench.objectives import objective_options, objectives
from dsctl.options import PLOTS, NewFile, workload_option
from dsctl.profile import profile_of, wanted_by
from dsobserve.terminal import output
from dsplan.profiling import MOST_TOKENS, Effort
from dssim.wish import Wish
from dstopology.load import load
from dswire.errors import BadInput


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
@workload_option("humaneval")
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
@objective_options
@click.option("--profile", type=click.Path(path_type=Path), help="Of `dsctl profile`; what it lacks is measured.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=NewFile("plot", *PLOTS), help="Draw it (.png, .svg, .pdf).")
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
    two. Before and after each round a load of its own tells how fast the machine is just then.

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
