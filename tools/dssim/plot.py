"""Plots of a run. Needs matplotlib, which the extra ``plan`` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dssim.records import Run
from dstopology.resolved import Slo
from dswire.errors import BadInput, StartFailed


def check() -> None:
    """Raise :class:`StartFailed` when matplotlib is not there: best before a long run, not after it."""
    try:
        import matplotlib as _  # noqa: F401
    except ModuleNotFoundError as error:
        raise StartFailed(
            "plots need the package matplotlib, which is not installed",
            remedy="install it with `pip install 'distserve[plan]'`, or leave --plot out",
        ) from error


def save(run: Run, slo: Slo, path: Path) -> None:
    """Write distributions and timelines as PNG, SVG or PDF, by the ending of ``path``.

    Raises :class:`BadInput` when the file cannot be written, and :class:`StartFailed` as :func:`check` does.
    """
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    good = [one for one in run.records if not one.error]
    _distribution(axes[0][0], [one.ttft_s for one in good], slo.ttft_s, "TTFT")
    _distribution(axes[0][1], [one.tpot_s for one in good if one.output_tokens > 1], slo.tpot_s, "TPOT")
    _timeline(axes[1][0], run, "waiting", "sequences waiting")
    _timeline(axes[1][1], run, "blocks_held", "KV blocks held")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the plot cannot be written to {path}: {error}", remedy="name a .png, .svg or .pdf"
        ) from error


def _distribution(axes: Any, values_s: Sequence[float], slo_s: float, name: str) -> None:
    ordered = sorted(value * 1e3 for value in values_s)
    shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
    axes.plot(ordered, shares, drawstyle="steps-post")
    axes.axvline(slo_s * 1e3, linestyle="--", color="tab:red", label=f"SLO {slo_s * 1e3:g} ms")
    axes.set(xlabel=f"{name} (ms)", ylabel="share of requests", ylim=(0, 1))
    axes.legend()


def _timeline(axes: Any, run: Run, figure: str, label: str) -> None:
    for name in sorted({name for _, name, _ in run.seen.loads}):
        told = [(now - run.begun_s, getattr(load, figure)) for now, other, load in run.seen.loads if other == name]
        axes.plot([now for now, _ in told], [value for _, value in told], label=name)
    axes.set(xlabel="time (s)", ylabel=label)
    axes.legend()
