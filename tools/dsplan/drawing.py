"""Plots of plans and studies as SVG. Needs matplotlib, which the extra ``plan`` brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from dsobserve.files import writing
from dsplan.errors import PlanInput
from dssim.plot import COLOURS, GREY

#: file types that :func:`save` writes
TYPES = (".png", ".svg", ".pdf")

#: (x, y) of a line
Line = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    #: y of dashed lines, by what they mean
    marks: Mapping[str, float] = field(default_factory=dict)
    #: whether the lines are bars, their x being names
    bars: tuple[str, ...] = ()
    #: whether the lines are points
    scatter: bool = False
    #: range of y; None for as large as needed
    top: float | None = None


def figure(panels: Sequence[Panel]) -> Any:
    """The panels side by side, two in a row."""
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for one, panel in zip(axes, panels, strict=False):
        _draw(one, panel)
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    return drawn


def _draw(axes: Any, panel: Panel) -> None:
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        xs, ys = [x for x, _ in line], [y for _, y in line]
        if panel.bars:
            width = 0.8 / len(panel.lines)
            axes.bar([x + width * number for x in xs], ys, width, label=name, color=colour)
        elif panel.scatter:
            axes.scatter(xs, ys, label=name, color=colour, marker="osD^v<>P*X"[number % 10])
        else:
            axes.plot(xs, ys, label=name, color=colour, marker=".")
    for name, y in panel.marks.items():
        axes.axhline(y, linestyle="--", linewidth=1, color=GREY)
        axes.annotate(name, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if panel.bars:
        middle = 0.4 - 0.4 / len(panel.lines)
        axes.set_xticks([n + middle for n in range(len(panel.bars))], panel.bars, fontsize=8)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.set_ylim(bottom=0, top=panel.top)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y" if panel.bars else "both", linewidth=0.3)
    if len(panel.lines) > 1 or panel.scatter:
        axes.legend(fontsize=8)


def svg(panels: Sequence[Panel]) -> str:
    """To be put into a page."""
    text = StringIO()
    figure(panels).savefig(text, format="svg")
    found = text.getvalue()
    return found[found.index("<svg") :]


def save(panels: Sequence[Panel], path: Path) -> None:
    """Write a file, its type by its ending. Raises :class:`BadInput`."""
    if path.suffix.lower() not in TYPES:
        raise PlanInput(f"the plot {path} has no type that is known here", remedy=f"end it in {', '.join(TYPES)}")
    with writing("plot", path):
        figure(panels).savefig(path, dpi=150)
