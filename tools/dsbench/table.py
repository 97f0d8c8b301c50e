"""The figures as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dsbench.points import Measured, Point

#: within 1.3 of the roofline
_GOOD = 1 / 1.3
_POOR = 0.5
#: of a step's time, what Python and sampling may take
_OUTSIDE = 0.05


def table(results: Sequence[Measured], systems: Sequence[str]) -> Table:
    """One row a point; each system's milliseconds, tokens a second and fraction of the roofline, the best bold.

    Then our part of the limit of kernels that take turns; last, what part of our steps was spent outside the
    kernels, with Python and drawing.
    """
    made = Table(title="step in ms · tokens/s · roofline")
    for column in ("phase", "dtype"):
        made.add_column(column)
    for column in ("threads", "batch", "tokens", *systems, "to the best peer", "in turn", "outside kernels"):
        made.add_column(column, justify="right")
    points = list(dict.fromkeys(result.point for result in results))
    for point in points:
        here = {result.system: result for result in results if result.point == point}
        made.add_row(*_row(point, here, systems))
    return made


def _row(point: Point, here: dict[str, Measured], systems: Sequence[str]) -> list[Text]:
    least = min((result.seconds for result in here.values() if result.seconds is not None), default=0.0)
    cells = [
        Text(text)
        for text in (_phase(point), point.dtype, str(point.threads), str(point.batch), str(point.context))
    ]
    cells += [_cell(here.get(system), least) for system in systems]
    ours = here.get(systems[0])
    return [*cells, _ratio(here, systems[0]), _in_turn(ours), _outside(ours)]


def _phase(point: Point) -> str:
    if not point.temperature:
        return point.phase
    top_p = f", top-p {point.top_p:g}" if point.top_p < 1 else ""
    return f"{point.phase}, temperature {point.temperature:g}{top_p}"


def _cell(result: Measured | None, least: float) -> Text:
    if result is None or result.seconds is None:
        return Text("-", style="dim")
    style = "bold" if result.seconds == least else ""
    return Text.assemble(
        (f"{result.seconds * 1e3:.2f} · {result.tokens_per_s:,.0f} · ", style),
        _fraction(result.roofline_fraction or 0.0),
    )


def _fraction(fraction: float) -> Text:
    return Text(f"{fraction:.0%}", style="green" if fraction >= _GOOD else "yellow" if fraction >= _POOR else "red")


def _in_turn(ours: Measured | None) -> Text:
    if ours is None or ours.in_turn_fraction is None:
        return Text("-", style="dim")
    return _fraction(ours.in_turn_fraction)


def _outside(ours: Measured | None) -> Text:
    if ours is None or ours.outside_fraction is None:
        return Text("-", style="dim")
    return Text(f"{ours.outside_fraction:.1%}", style="green" if ours.outside_fraction < _OUTSIDE else "yellow")


def _ratio(here: dict[str, Measured], ours: str) -> Text:
    times = {system: result.seconds for system, result in here.items() if result.seconds is not None}
    peers = [seconds for system, seconds in times.items() if not system.startswith(ours)]
    if ours not in times or not peers:
        return Text("-", style="dim")
    ratio = min(peers) / times[ours]
    return Text(f"{ratio:.2f}x", style="green" if ratio >= 1 else "red")
