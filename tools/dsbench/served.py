"""What a run of the load generator came to: figures, for people and as JSON, and the log of its requests."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from dsbench.bootstrap import interval, percentile, share
from dsctl.simulated import percentiles
from dsobserve.files import writing
from dsobserve.terminal import counted
from dssim.records import Record
from dssim.statistics import PERCENTILES, Estimate, wilson
from dssim.workload import Arrival
from dstopology.resolved import Slo
from dswire.errors import BadInput

#: requests that were sent later than this make the figures doubtful, in seconds
LATE_S = 0.05


@dataclass(frozen=True, slots=True)
class Served:
    """Figures of the requests that count, with 95 % intervals; seconds."""

    requests: int
    finished: int
    #: code -> requests
    errors: dict[str, int]
    #: wanted and served requests a second, and output tokens a second
    offered_per_s: float
    requests_per_s: float
    tokens_per_s: float
    #: share of all that finished and met both objectives, and each
    attainment: Estimate
    ttft_attainment: Estimate
    tpot_attainment: Estimate
    #: percentile -> of those that finished
    ttft_s: dict[int, Estimate]
    #: of answers with two tokens or more
    tpot_s: dict[int, Estimate]
    total_s: dict[int, Estimate]
    #: the most that a request was sent late
    late_s: float


def serve_figures(
    records: Iterable[Record], slo: Slo, warmup_s: float, offered_per_s: float, late_s: float
) -> Served:
    """Of what was to be sent at ``warmup_s`` or later. Raises :class:`BadInput` where that is nothing."""
    counted = sorted((one for one in records if one.at_s >= warmup_s), key=lambda one: one.at_s)
    if not counted:
        raise BadInput("no request came after the warm-up", remedy="raise --duration or --rate")
    good = [one for one in counted if not one.error]
    ttft, tpot = ([one.ttft_s <= slo.ttft_s for one in counted], [one.tpot_s <= slo.tpot_s for one in counted])
    span_s = max(one.at_s + one.total_s for one in counted) - warmup_s
    return Served(
        requests=len(counted),
        finished=len(good),
        errors=dict(Counter(one.error for one in counted if one.error)),
        offered_per_s=offered_per_s,
        requests_per_s=len(good) / span_s,
        tokens_per_s=sum(one.output_tokens for one in good) / span_s,
        attainment=_share([a and b for a, b in zip(ttft, tpot, strict=True)]),
        ttft_attainment=_share(ttft),
        tpot_attainment=_share(tpot),
        ttft_s=_percentiles([one.ttft_s for one in good]),
        tpot_s=_percentiles([one.tpot_s for one in good if one.output_tokens > 1]),
        total_s=_percentiles([one.total_s for one in good]),
        late_s=late_s,
    )


def _share(hits: Sequence[bool]) -> Estimate:
    """The wider of two intervals: resampling cannot know of misses where none was seen, and Wilson's can."""
    ours, theirs = interval(hits, share), wilson(sum(hits), len(hits))
    return Estimate(ours.value, min(max(ours.low, 0.0), theirs.low), max(min(ours.high, 1.0), theirs.high))


def _percentiles(values: Sequence[float]) -> dict[int, Estimate]:
    return {percent: interval(values, percentile(percent)) for percent in PERCENTILES} if values else {}


def data(served: Served, slo: Slo) -> dict[str, Any]:
    """What ``--json`` prints; milliseconds."""
    return {
        "slo": {"ttft_ms": slo.ttft_s * 1e3, "tpot_ms": slo.tpot_s * 1e3, "attainment": slo.attainment},
        "requests": served.requests,
        "finished": served.finished,
        "errors": served.errors,
        "offered_per_s": served.offered_per_s,
        "requests_per_s": served.requests_per_s,
        "tokens_per_s": served.tokens_per_s,
        "attainment": _plain(served.attainment, 1),
        "ttft_attainment": _plain(served.ttft_attainment, 1),
        "tpot_attainment": _plain(served.tpot_attainment, 1),
        "ttft_ms": _times(served.ttft_s),
        "tpot_ms": _times(served.tpot_s),
        "total_ms": _times(served.total_s),
        "sent_late_ms": served.late_s * 1e3,
    }


def _times(percentiles: dict[int, Estimate]) -> dict[str, Any]:
    return {f"p{percent}": _plain(one, 1e3) for percent, one in percentiles.items()}


def _plain(one: Estimate, unit: float) -> dict[str, float | None]:
    ends = {"value": one.value, "low": one.low, "high": one.high}
    return {name: value * unit if math.isfinite(value) else None for name, value in ends.items()}


def show(console: Console, served: Served, slo: Slo) -> None:
    """Print the figures."""
    met = served.attainment.value >= slo.attainment
    console.print(
        f"[bold]{_percent(served.attainment)}[/] of {served.requests} requests had TTFT within "
        f"{slo.ttft_s * 1e3:g} ms ({served.ttft_attainment.value:.1%}) and TPOT within {slo.tpot_s * 1e3:g} ms "
        f"({served.tpot_attainment.value:.1%}); wanted {slo.attainment:.0%}: "
        + ("[green]met[/]" if met else "[red]missed[/]"),
        soft_wrap=True,
    )
    console.print(percentiles(served.ttft_s, served.tpot_s, served.total_s))
    console.print(
        f"offered {served.offered_per_s:.2f}, served {served.requests_per_s:.2f} requests/s, "
        f"{served.tokens_per_s:.0f} tokens/s"
    )
    for code, count in served.errors.items():
        console.print(f"[red]{counted(count, 'request')} failed: {code}[/]")
    if served.late_s > LATE_S:
        console.print(
            f"[yellow]requests were sent up to {served.late_s * 1e3:.0f} ms late, which counts as waiting[/]"
        )


def _percent(one: Estimate) -> str:
    ends = f"{one.low:.1%} to {one.high:.1%}" if math.isfinite(one.high - one.low) else "of one"
    return f"{one.value:.1%} ({ends})"


def write_log(path: Path, arrivals: Sequence[Arrival], records: Iterable[Record]) -> None:
    """JSON lines, one for each request by arrival, which the simulator replays. Raises :class:`BadInput`.

    ``output_tokens`` are those that were asked for, ``received_tokens`` those that came.
    """
    with writing("log", path), path.open("w", encoding="utf-8") as file:
        for record in sorted(records, key=lambda one: one.number):
            file.write(json.dumps(_row(arrivals[record.number], record)) + "\n")


def _row(arrival: Arrival, record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        "at_s": record.at_s,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": arrival.output_tokens,
        "received_tokens": record.output_tokens,
        "ttft_s": record.first_s,
        "total_s": record.total_s,
        "error": record.error,
    }
    if arrival.hashes:
        row["hash_ids"] = arrival.hashes
    if record.ledger is not None:
        row["ledger"] = msgspec.to_builtins(record.ledger)
    return row
