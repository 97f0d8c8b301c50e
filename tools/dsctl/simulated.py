"""What ``dsctl simulate`` prints: a table for people, JSON for programs. Both in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsobserve.terminal import counted, digits, figures

if TYPE_CHECKING:
    from rich.table import Table

    from dssim.rates import AtRate
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
        "retried": _retried(run),
        "failures": [{"at_s": at_s - run.begun_s, "name": name, "up": up} for at_s, name, up in run.seen.failures],
        "held_at_the_end": dict(run.held),
        "simulated_s": run.simulated_s,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
    }


def data_rates(runs: Sequence[AtRate], slo: Slo) -> dict[str, Any]:
    """What ``--json`` prints of several rates."""
    from dssim.rates import goodput

    each = [{"rate": one.rate} | data(one.run, one.summary, slo) for one in runs]
    return {"goodput": goodput(runs, slo.attainment), "rates": each}


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


def _retried(run: Run) -> int:
    """Requests of which an attempt was lost, and that finished nevertheless."""
    return sum(one.ledger.retries > 0 for one in run.records if one.ledger is not None)


def show(run: Run, summary: Summary, slo: Slo, instances: int, about: str) -> None:
    """Print the tables. ``about``: whose times of steps these are."""
    from dsobserve.terminal import output

    console = output()
    verdict = "[green]met[/]" if summary.attainment.value >= slo.attainment else "[red]missed[/]"
    console.print(
        f"[bold]{summary.attainment.value:.1%}[/] of {summary.requests} requests "
        f"({summary.attainment.low:.1%} to {summary.attainment.high:.1%}) had TTFT within {slo.ttft_s * 1e3:g} ms "
        f"({summary.ttft_attainment.value:.1%}) and TPOT within {slo.tpot_s * 1e3:g} ms "
        f"({summary.tpot_attainment.value:.1%}); wanted {slo.attainment:.0%}: {verdict}",
        soft_wrap=True,
    )
    if summary.finished:
        _show_times(console, run, summary)
    _errors(console, run, summary)
    rates = f"{summary.requests_per_s:.2f} requests/s, {summary.tokens_per_s:.0f} tokens/s on {instances} instances"
    speed = summary.requests / run.wall_s if run.wall_s else 0.0
    took = f"simulated {run.simulated_s:.1f} s in {run.wall_s:.1f} s ({speed:.0f} requests/s)"
    console.print(f"{rates}; [dim]{took}[/]", soft_wrap=True)
    console.print(f"[dim]times of steps: {about}[/]", soft_wrap=True)


def _show_times(console: Any, run: Run, summary: Summary) -> None:
    """Of the requests that finished."""
    console.print(percentiles(summary.ttft_s, summary.tpot_s, summary.total_s))
    console.print("mean stages (ms): " + _stages(summary), soft_wrap=True)
    console.print("busy: " + ", ".join(f"{name} {share:.0%}" for name, share in _busy(run).items()), soft_wrap=True)


def percentiles(
    ttft_s: Mapping[int, Estimate], tpot_s: Mapping[int, Estimate], total_s: Mapping[int, Estimate]
) -> Table:
    """A row for each, in milliseconds with their intervals; empty where nothing was measured."""
    table = figures("ms", "TTFT", "TPOT", "total")
    for percent in total_s:
        row = (times.get(percent) for times in (ttft_s, tpot_s, total_s))
        table.add_row(f"p{percent}", *("" if one is None else _cell(one) for one in row))
    return table


def show_rates(runs: Sequence[AtRate], slo: Slo, about: str) -> None:
    """Print a line for each rate. ``about``: whose times of steps these are."""
    from dsobserve.terminal import output
    from dssim.rates import goodput

    console = output()
    columns = [f"{name}\np{percent}" for name in ("TTFT", "TPOT") for percent in (50, 90, 99)]
    table = figures("rate", "good", "interval", *columns, "busiest", words=0)
    # all of it fits a narrow terminal
    table.padding = (0, 1, 0, 0)
    for one in runs:
        share = one.summary.attainment
        colour = "green" if share.value >= slo.attainment else "red"
        times = [
            _digits(per[percent].value * 1e3) if per else "-"
            for per in (one.summary.ttft_s, one.summary.tpot_s)
            for percent in (50, 90, 99)
        ]
        busiest = max(_busy(one.run).items(), key=lambda item: item[1], default=("", 0.0))
        interval = f"{share.low:.1%} to {share.high:.1%}"
        table.add_row(
            f"{one.rate:g}", f"[{colour}]{share.value:.1%}[/]", interval, *times, f"{busiest[0]} {busiest[1]:.0%}"
        )
    console.print(table)
    most = goodput(runs, slo.attainment)
    console.print(
        f"at least {slo.attainment:.0%} of requests have TTFT within {slo.ttft_s * 1e3:g} ms and TPOT within "
        f"{slo.tpot_s * 1e3:g} ms up to [bold]{digits(most)}[/] requests/s"
        + (", the highest rate that was tried" if most == runs[-1].rate else ""),
        soft_wrap=True,
    )
    console.print(f"[dim]times of steps: {about}[/]", soft_wrap=True)


def _errors(console: Any, run: Run, summary: Summary) -> None:
    for code, count in summary.errors.items():
        console.print(f"[red]{counted(count, 'request')} failed: {code}[/]")
    for thing, count in run.held.items():
        console.print(f"[red]a defect: {count} {thing} were never given back[/]")
    if run.seen.failures:
        died = ", ".join(
            f"{name} {'back' if up else 'died'} at {at_s - run.begun_s:g} s" for at_s, name, up in run.seen.failures
        )
        console.print(
            f"[yellow]{died}; {counted(_retried(run), 'request')} finished by another attempt[/]", soft_wrap=True
        )
    if run.seen.preemptions:
        console.print(f"[yellow]{counted(run.seen.preemptions, 'sequence')} gave way for want of KV blocks[/]")


def _cell(one: Estimate) -> str:
    """A time with its interval; few requests do not tell how far that reaches."""
    low, high = (_digits(end * 1e3) if math.isfinite(end) else "" for end in (one.low, one.high))
    interval = f" ({low} to {high})" if low and high else f" (from {low})" if low else ""
    return f"{_digits(one.value * 1e3)}{interval}"


def _digits(value_ms: float) -> str:
    """Three digits at least, and no more behind the point than tell something."""
    return f"{value_ms:.0f}" if value_ms >= 100 else f"{value_ms:.1f}"


def _stages(summary: Summary) -> str:
    from dsctl.ledger import label

    shown = {label(name): value * 1e3 for name, value in summary.stages_s.items()}
    return "; ".join(f"{name} {value:.1f}" for name, value in shown.items() if value >= 0.05)
