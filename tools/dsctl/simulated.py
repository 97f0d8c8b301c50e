"""What ``dsctl simulate`` prints: a table for people, JSON for programs. Both in milliseconds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dssim.records import Run
    from dssim.statistics import Estimate, Summary
    from dstopology.resolved import Slo


def data(run: Run, summary: Summary, slo: Slo) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "slo": {"ttft_ms": slo.ttft_s * 1e3, "tpot_ms": slo.tpot_s * 1e3, "attainment": slo.attainment},
        "attainment": _share(summary.attainment),
        "ttft_attainment": _share(summary.ttft_attainment),
        "tpot_attainment": _share(summary.tpot_attainment),
        "requests": summary.requests,
        "finished": summary.finished,
        "errors": summary.errors,
        "requests_per_s": summary.requests_per_s,
        "tokens_per_s": summary.tokens_per_s,
        "ttft_ms": {"mean": summary.ttft_mean_s * 1e3} | _times(summary.ttft_s),
        "tpot_ms": {"mean": summary.tpot_mean_s * 1e3} | _times(summary.tpot_s),
        "total_ms": _times(summary.total_s),
        "stages_ms": {name.removesuffix("_s"): value * 1e3 for name, value in summary.stages_s.items()},
        "busy": _busy(run),
        "preemptions": run.seen.preemptions,
        "held_at_the_end": dict(run.held),
        "simulated_s": run.simulated_s,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
    }


def _share(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _times(percentiles: Mapping[int, Estimate]) -> dict[str, Any]:
    return {
        f"p{percent}": {end: _ms(getattr(one, end)) for end in ("value", "low", "high")}
        for percent, one in percentiles.items()
    }


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for what is not known, since JSON has no infinity."""
    return seconds * 1e3 if math.isfinite(seconds) else None


def _busy(run: Run) -> dict[str, float]:
    """Share of the time that each instance was in a step."""
    return {name: seconds / run.simulated_s for name, seconds in sorted(run.seen.busy_s.items())}


def show(run: Run, summary: Summary, slo: Slo, instances: int) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    verdict = "[green]met[/]" if summary.attainment.value >= slo.attainment else "[red]missed[/]"
    console.print(
        f"[bold]{summary.attainment.value:.1%}[/] of {summary.requests} requests "
        f"({summary.attainment.low:.1%} to {summary.attainment.high:.1%}) had TTFT within {slo.ttft_s * 1e3:g} ms "
        f"({summary.ttft_attainment.value:.1%}) and TPOT within {slo.tpot_s * 1e3:g} ms "
        f"({summary.tpot_attainment.value:.1%}); wanted {slo.attainment:.0%}: {verdict}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("ms", *(f"p{percent}" for percent in summary.total_s)):
        table.add_column(heading, justify="left" if heading == "ms" else "right", no_wrap=True)
    for name, times in (("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s), ("total", summary.total_s)):
        table.add_row(name, *(_cell(one) for one in times.values()))
    console.print(table)
    console.print("mean stages (ms): " + _stages(summary), soft_wrap=True)
    console.print("busy: " + ", ".join(f"{name} {share:.0%}" for name, share in _busy(run).items()), soft_wrap=True)
    _errors(console, run, summary)
    rates = f"{summary.requests_per_s:.2f} requests/s, {summary.tokens_per_s:.0f} tokens/s on {instances} instances"
    speed = summary.requests / run.wall_s if run.wall_s else 0.0
    took = f"simulated {run.simulated_s:.1f} s in {run.wall_s:.1f} s ({speed:.0f} requests/s)"
    console.print(f"{rates}; [dim]{took}[/]", soft_wrap=True)


def _errors(console: Any, run: Run, summary: Summary) -> None:
    for code, count in summary.errors.items():
        console.print(f"[red]{count} requests failed: {code}[/]")
    for thing, count in run.held.items():
        console.print(f"[red]a defect: {count} {thing} were never given back[/]")
    if run.seen.preemptions:
        console.print(f"[yellow]{run.seen.preemptions} sequences gave way for want of KV blocks[/]")


def _cell(one: Estimate) -> str:
    ends = [f"{end * 1e3:.1f}" if math.isfinite(end) else "?" for end in (one.low, one.high)]
    return f"{one.value * 1e3:.1f} ({ends[0]} to {ends[1]})"


def _stages(summary: Summary) -> str:
    shown = {name.removesuffix("_s").replace("_", " "): value * 1e3 for name, value in summary.stages_s.items()}
    return ", ".join(f"{name} {value:.1f}" for name, value in shown.items() if value >= 0.05)
