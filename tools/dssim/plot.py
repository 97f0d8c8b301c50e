"""Plots of a run. Needs matplotlib, which the extra ``plan`` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dssim.rates import AtRate
from dssim.records import Run
from dssim.statistics import Estimate
from dstopology.resolved import Slo
from dswire.errors import BadInput, StartFailed

#: colours that people with any colour vision tell apart (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: of the lines that figures are held against
GREY = "#777777"


def check() -> None:
    """Raise :class:`StartFailed` when matplotlib is not there: best before a long run, not after it."""
    try:
        import matplotlib as _  # noqa: F401
    except ModuleNotFoundError as error:
        raise StartFailed(
            "plots need the package matplotlib, which is not installed",
            remedy="install it with `pip install 'distserve[plan]'`, or leave the plot out",
        ) from error


def save(run: Run, slo: Slo, path: Path, title: str) -> None:
    """Write distributions and timelines as PNG, SVG or PDF, by the ending of ``path``.

    Raises :class:`BadInput` when the file cannot be written, and :class:`StartFailed` as :func:`check` does.
    """
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    good = [one for one in run.records if not one.error]
    _distribution(axes[0][0], [one.ttft_s for one in good], slo.ttft_s, "TTFT")
    _distribution(axes[0][1], [one.tpot_s for one in good if one.output_tokens > 1], slo.tpot_s, "TPOT")
    _timeline(axes[1][0], run, "waiting", "sequences waiting")
    _timeline(axes[1][1], run, "blocks_held", "KV blocks held")
    _write(figure, path)


def save_rates(runs: Sequence[AtRate], slo: Slo, path: Path, title: str) -> None:
    """Write attainment, TTFT and TPOT over the rate. Raises as :func:`save` does."""
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    _attainment(left, runs, slo)
    ttft = [(one.rate, one.summary.ttft_s) for one in runs if one.summary.ttft_s]
    tpot = [(one.rate, one.summary.tpot_s) for one in runs if one.summary.tpot_s]
    _over_rates(middle, ttft, slo.ttft_s, "TTFT")
    _over_rates(right, tpot, slo.tpot_s, "TPOT")
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the plot cannot be written to {path}: {error}", remedy="name a .png, .svg or .pdf"
        ) from error


def _attainment(axes: Any, runs: Sequence[AtRate], slo: Slo) -> None:
    rates = [one.rate for one in runs]
    shares = {
        "both": [one.summary.attainment for one in runs],
        "TTFT": [one.summary.ttft_attainment for one in runs],
        "TPOT": [one.summary.tpot_attainment for one in runs],
    }
    for colour, (name, values) in zip(COLOURS, shares.items(), strict=False):
        style = "-o" if name == "both" else ":"
        axes.plot(rates, [one.value for one in values], style, label=name, markersize=4, color=colour)
        if name == "both":
            low, high = [one.low for one in values], [one.high for one in values]
            axes.fill_between(rates, low, high, alpha=0.2, color=colour, label="95% interval")
    axes.axhline(slo.attainment, linestyle="--", color=GREY, label=f"wanted {slo.attainment:.0%}")
    axes.set(xlabel="requests/s", ylabel="share that meets its objectives", ylim=(0, 1.02))
    _dress(axes)


def _over_rates(axes: Any, points: Sequence[tuple[float, dict[int, Estimate]]], slo_s: float, name: str) -> None:
    for colour, percent in zip(COLOURS, (50, 90, 99), strict=False):
        values = [times[percent].value * 1e3 for _, times in points]
        axes.plot([rate for rate, _ in points], values, "-o", markersize=4, label=f"p{percent}", color=colour)
    axes.axhline(slo_s * 1e3, linestyle="--", color=GREY, label=f"objective {slo_s * 1e3:g} ms")
    axes.set(xlabel="requests/s", ylabel=f"{name} (ms)", yscale="log")
    _plain(axes.yaxis)
    _dress(axes)


def _distribution(axes: Any, values_s: Sequence[float], slo_s: float, name: str) -> None:
    ordered = sorted(value * 1e3 for value in values_s)
    shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
    axes.plot(ordered, shares, drawstyle="steps-post", color=COLOURS[0])
    axes.axvline(slo_s * 1e3, linestyle="--", color=GREY, label=f"objective {slo_s * 1e3:g} ms")
    axes.set(xlabel=f"{name} (ms)", ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    _plain(axes.xaxis)
    _dress(axes)


def _timeline(axes: Any, run: Run, figure: str, label: str) -> None:
    names = sorted({name for _, name, _ in run.seen.loads})
    for place, name in enumerate(names):
        told = [(now - run.begun_s, getattr(load, figure)) for now, other, load in run.seen.loads if other == name]
        axes.plot([now for now, _ in told], [value for _, value in told], label=name, color=COLOURS[place % 7])
    for at_s, _, up in run.seen.failures:
        axes.axvline(at_s - run.begun_s, linestyle=":", color=COLOURS[2 if up else 1])
    axes.set(xlabel="time (s)", ylabel=label)
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    if names:
        _dress(axes)


def _plain(axis: Any) -> None:
    """Numbers as people write them along a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _dress(axes: Any) -> None:
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(fontsize=8)
