"""Predicted beside measured: what the simulator said of a system, and what the system did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsbench.rounds import Load, Tried
from dsbench.served import Served, data
from dsobserve.terminal import figures
from dssim.records import Record
from dssim.statistics import stages
from dstopology.resolved import Slo

#: aims: attainment in points, median and 99th percentile of TTFT and TPOT as shares
AIM_POINTS, AIM_MEDIAN, AIM_TAIL = 0.02, 0.10, 0.20
#: stages that take less are not told to people
LEAST_MS = 0.1


@dataclass(frozen=True, slots=True)
class Compared:
    """One rate."""

    system: str
    rate: float
    predicted: Served
    measured: Served
    #: of which the figures are
    loads: tuple[Load, ...] = ()

    @property
    def covered(self) -> bool:
        """Whether the predicted attainment lies in the interval of the measured one."""
        return self.measured.attainment.covers(self.predicted.attainment.value)

    @property
    def points(self) -> float:
        """Predicted attainment less measured."""
        return self.predicted.attainment.value - self.measured.attainment.value

    def off(self, name: str, percent: int) -> float:
        """Predicted percentile of ``ttft_s`` or ``tpot_s`` to the measured one, less 1; nan where there is none."""
        ours, theirs = (getattr(side, name).get(percent) for side in (self.predicted, self.measured))
        return ours.value / theirs.value - 1 if ours and theirs and theirs.value else math.nan

    def possible(self, name: str, percent: int) -> bool:
        """Whether the interval of the measured percentile covers the predicted one: chance may explain the rest."""
        ours, theirs = (getattr(side, name).get(percent) for side in (self.predicted, self.measured))
        return ours is not None and theirs is not None and theirs.covers(ours.value)


#: (heading, figure, percentile, aim)
_FIGURES = (
    ("TTFT p50", "ttft_s", 50, AIM_MEDIAN),
    ("TTFT p99", "ttft_s", 99, AIM_TAIL),
    ("TPOT p50", "tpot_s", 50, AIM_MEDIAN),
    ("TPOT p99", "tpot_s", 99, AIM_TAIL),
)


def show(console: Console, rows: Sequence[Compared], slo: Slo) -> None:
    """The table; what misses its aim is yellow where the interval of the measured covers it, else red."""
    console.print(
        f"share that has TTFT within {slo.ttft_s * 1e3:g} ms and TPOT within {slo.tpot_s * 1e3:g} ms; "
        "milliseconds; [bold]predicted / measured[/]",
        soft_wrap=True,
    )
    table = figures("system", "rate", "requests", "attainment", "95%", *(figure[0] for figure in _FIGURES))
    for row in rows:
        first = (row.system, f"{row.rate:.2f}", str(row.measured.requests), _attainment(row), _interval(row))
        table.add_row(*first, *_cells(row))
    console.print(table)
    console.print(_verdict(rows), soft_wrap=True)
    loads = [load for row in rows for load in row.loads]
    if loads:
        console.print(_where(loads), soft_wrap=True)
        console.print(_machine(loads), soft_wrap=True)


def _attainment(row: Compared) -> str:
    sides = f"{row.predicted.attainment.value:.1%} / {row.measured.attainment.value:.1%}"
    return f"{sides} {_coloured(f'{row.points * 100:+.1f}', abs(row.points) <= AIM_POINTS)}"


def _interval(row: Compared) -> str:
    """Of what was measured."""
    share = row.measured.attainment
    ends = f"{share.low:.0%} to {share.high:.0%}" if math.isfinite(share.high - share.low) else "?"
    return _coloured(ends, row.covered)


def _cells(row: Compared) -> list[str]:
    made = []
    for _, name, percent, aim in _FIGURES:
        off = row.off(name, percent)
        if math.isnan(off):
            made.append("?")
            continue
        ours, theirs = (getattr(side, name)[percent].value * 1e3 for side in (row.predicted, row.measured))
        colour = "green" if abs(off) <= aim else "yellow" if row.possible(name, percent) else "red"
        made.append(f"{ours:.0f} / {theirs:.0f} [{colour}]{off:+.0%}[/]")
    return made


def _coloured(text: str, good: bool) -> str:
    return f"[{'green' if good else 'red'}]{text}[/]"


def within(row: Compared) -> dict[str, bool]:
    """Each figure: whether it is within its aim."""
    found = {"attainment": abs(row.points) <= AIM_POINTS}
    for heading, name, percent, aim in _FIGURES:
        found[heading] = abs(row.off(name, percent)) <= aim
    return found


def _verdict(rows: Sequence[Compared]) -> str:
    counts = [f"{name} {sum(within(row)[name] for row in rows)} of {len(rows)}" for name in within(rows[0])]
    covered = [f"attainment {sum(row.covered for row in rows)} of {len(rows)}"]
    for heading, name, percent, _ in _FIGURES:
        covered.append(f"{heading} {sum(row.possible(name, percent) for row in rows)} of {len(rows)}")
    return (
        f"within the aims ({AIM_POINTS * 100:g} points, {AIM_MEDIAN:.0%} at p50, {AIM_TAIL:.0%} at p99): "
        f"{', '.join(counts)}\npredicted in the 95 % interval of the measured: {', '.join(covered)}"
    )


def stages_ms(loads: Sequence[Load]) -> dict[str, tuple[float, float]]:
    """Mean milliseconds of each stage of the ledger, and of the way to the client, predicted and measured."""
    simulated = [record for load in loads for run in load.predicted for record in run]
    sides = (simulated, [record for load in loads for record in load.tried.records])
    ours, theirs = ({**stages(side), "client_s": _client_s(side)} for side in sides)
    return {name.removesuffix("_s"): (ours.get(name, 0.0) * 1e3, theirs[name] * 1e3) for name in theirs}


def _client_s(records: Sequence[Record]) -> float:
    """Mean time of the first token that the router knows nothing of."""
    known = [one.ttft_s - one.ledger.ttft_s for one in records if one.ledger is not None]
    return sum(known) / len(known) if known else 0.0


def _where(loads: Sequence[Load]) -> str:
    told = [
        f"{name.replace('_', ' ')} {ours:.1f} / {theirs:.1f}"
        for name, (ours, theirs) in stages_ms(loads).items()
        if max(ours, theirs) >= LEAST_MS
    ]
    return "a request's mean time by stage: " + ", ".join(told)


def _machine(loads: Sequence[Load]) -> str:
    """What is to be known of the machine before believing the figures."""
    repeats, disturbed = sum(load.tries - 1 for load in loads), sum(load.disturbed for load in loads)
    steal, others = (
        sum(getattr(load.tried.disturbance, name) for load in loads) / len(loads) for name in ("steal", "others")
    )
    return (
        f"{repeats} repetitions of {len(loads)} loads, {disturbed} still disturbed; of the cores' time {steal:.1%} "
        f"stolen and {others:.1%} others'"
    )


def told(load: Load, slo: Slo, warmup_s: float) -> str:
    """A line for a load."""
    predicted = _met([record for run in load.predicted for record in run], slo, warmup_s)
    measured = _met(load.tried.records, slo, warmup_s)
    return (
        f"round {load.turn.round + 1}, {load.turn.rate:.2f}/s: predicted {predicted:.1%}, measured {measured:.1%}"
    )


def machine(tried: Tried, tries: int) -> str:
    """How the machine was meanwhile."""
    repeated = f", {tries} tries" if tries > 1 else ""
    return f"stolen {tried.disturbance.steal:.1%}, others {tried.disturbance.others:.1%}{repeated}"


def _met(records: Sequence[Record], slo: Slo, warmup_s: float) -> float:
    met = [one.ttft_s <= slo.ttft_s and one.tpot_s <= slo.tpot_s for one in records if one.at_s >= warmup_s]
    return sum(met) / len(met) if met else math.nan


def _plain_load(load: Load, slo: Slo, warmup_s: float) -> dict[str, Any]:
    seen = load.tried.disturbance
    predicted = [record for run in load.predicted for record in run]
    return {
        "round": load.turn.round + 1,
        "predicted_attainment": _finite(_met(predicted, slo, warmup_s)),
        "measured_attainment": _finite(_met(load.tried.records, slo, warmup_s)),
        "steal": seen.steal,
        "others": seen.others,
        "waiting": seen.waiting,
        "tries": load.tries,
        "disturbed": load.disturbed,
    }


def plain(rows: Sequence[Compared], slo: Slo, warmup_s: float = 0.0) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [
        {
            "system": row.system,
            "rate": row.rate,
            "predicted": data(row.predicted, slo),
            "measured": data(row.measured, slo),
            "attainment_points": row.points * 100,
            "off": {heading: _finite(row.off(name, percent)) for heading, name, percent, _ in _FIGURES},
            "within": within(row),
            "covered": row.covered,
            "possible": {heading: row.possible(name, percent) for heading, name, percent, _ in _FIGURES},
            "stages_ms": {
                name: {"predicted": ours, "measured": theirs}
                for name, (ours, theirs) in stages_ms(row.loads).items()
            },
            "rounds": [_plain_load(load, slo, warmup_s) for load in row.loads],
        }
        for row in rows
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save(rows: Sequence[Compared], path: Path) -> None:
    """Attainment, TTFT and TPOT against the rate, predicted and measured, as PNG, SVG or PDF.

    Raises :class:`StartFailed` without matplotlib and :class:`BadInput` when the file cannot be written.
    """
    from dssim.plot import COLOURS, check
    from dswire.errors import BadInput

    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for place, system in enumerate(dict.fromkeys(row.system for row in rows)):
        for side, style in (("predicted", "--"), ("measured", "-")):
            mine = [(row.rate, getattr(row, side)) for row in rows if row.system == system]
            _lines(axes, mine, f"{system}, {side}", COLOURS[place % len(COLOURS)], style)
    for one, label in zip(axes, ("share within both objectives", "TTFT (ms)", "TPOT (ms)"), strict=True):
        one.set(xlabel="requests/s", ylabel=label)
        one.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the plot cannot be written to {path}: {error}", remedy="name a .png, .svg or .pdf"
        ) from error


def _lines(axes: Any, rows: Sequence[tuple[float, Served]], label: str, colour: str, style: str) -> None:
    rates = [rate for rate, _ in rows]
    shares = [served.attainment for _, served in rows]
    axes[0].plot(rates, [one.value for one in shares], style, marker="o", color=colour, label=label)
    if style == "-":
        axes[0].fill_between(
            rates, [one.low for one in shares], [one.high for one in shares], color=colour, alpha=0.15
        )
    for place, name in ((1, "ttft_s"), (2, "tpot_s")):
        for percent, marker in ((50, "o"), (99, "^")):
            known = [
                (rate, getattr(served, name)[percent].value * 1e3) for rate, served in rows if getattr(served, name)
            ]
            axes[place].plot(*zip(*known, strict=True), style, marker=marker, color=colour) if known else None
    axes[1].set_title("circles p50, triangles p99", fontsize="small")
