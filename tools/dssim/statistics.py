"""Figures of a run: attainment and percentiles, each with its 95 % interval.

The intervals treat requests as independent. Near saturation neighbours wait in the same queue, so the true
intervals are wider there; runs with other seeds show by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from dssim.records import Record
from dstopology.resolved import Slo

#: standard deviations of a two-sided 95 % interval of the normal distribution
Z = 1.959964
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval; an end of the interval that the sample cannot tell is infinite."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether ``value`` lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run. Percentiles are of requests that finished, in seconds; attainment is of all."""

    requests: int
    finished: int
    #: error code -> requests that ended with it
    errors: dict[str, int]
    #: of finished requests and their output tokens, from the first submission to the last end
    requests_per_s: float
    tokens_per_s: float
    #: share of all requests that finished and met both objectives, and each of them
    attainment: Estimate
    ttft_attainment: Estimate
    tpot_attainment: Estimate
    #: percentile -> seconds
    ttft_s: dict[int, Estimate]
    #: of answers with two tokens or more
    tpot_s: dict[int, Estimate]
    total_s: dict[int, Estimate]
    ttft_mean_s: float
    tpot_mean_s: float
    #: stage of the ledger -> mean seconds
    stages_s: dict[str, float]


def summarize(records: Sequence[Record], slo: Slo, simulated_s: float) -> Summary:
    """All figures of a run."""
    good = [one for one in records if not one.error]
    errors: dict[str, int] = {}
    for one in records:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    first = [one.ttft_s <= slo.ttft_s for one in records]
    each = [one.tpot_s <= slo.tpot_s for one in records]
    ttfts = [one.ttft_s for one in good]
    tpots = [one.tpot_s for one in good if one.output_tokens > 1]
    over = simulated_s or math.inf
    return Summary(
        requests=len(records),
        finished=len(good),
        errors=errors,
        requests_per_s=len(good) / over,
        tokens_per_s=sum(one.output_tokens for one in good) / over,
        attainment=wilson(sum(a and b for a, b in zip(first, each, strict=True)), len(records)),
        ttft_attainment=wilson(sum(first), len(records)),
        tpot_attainment=wilson(sum(each), len(records)),
        ttft_s=percentiles(ttfts),
        tpot_s=percentiles(tpots),
        total_s=percentiles([one.total_s for one in good]),
        ttft_mean_s=_mean(ttfts),
        tpot_mean_s=_mean(tpots),
        stages_s=stages(good),
    )


def wilson(hits: int, count: int) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927); of nothing, the share is 0 and all is possible."""
    if count == 0:
        return Estimate(0.0, 0.0, 1.0)
    share, square = hits / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    # at its ends the interval touches 0 and 1, which rounding may miss
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(share, low if hits else 0.0, high if hits < count else 1.0)


def percentiles(values: Iterable[float]) -> dict[int, Estimate]:
    """:data:`PERCENTILES` of a sample; empty for an empty one."""
    ordered = sorted(values)
    return {percent: percentile(ordered, percent) for percent in PERCENTILES} if ordered else {}


def percentile(ordered: Sequence[float], percent: float) -> Estimate:
    """A percentile (nearest rank) of an ascending sample, between two of its order statistics.

    How many of n values lie below the true percentile is binomial, so the ranks ``n p +- Z sqrt(n p (1 - p))``
    hold it in 95 % of samples, whatever the distribution (Conover, Practical Nonparametric Statistics, 3.2).
    """
    count, share = len(ordered), percent / 100
    half = Z * math.sqrt(count * share * (1 - share))
    value = ordered[max(0, math.ceil(count * share) - 1)]
    low, high = math.floor(count * share - half) - 1, math.ceil(count * share + half)
    return Estimate(value, ordered[low] if low >= 0 else -math.inf, ordered[high] if high < count else math.inf)


def stages(good: Iterable[Record]) -> dict[str, float]:
    """Mean seconds of each stage of the ledger; empty where there is none."""
    ledgers = [one.ledger for one in good if one.ledger is not None]
    if not ledgers:
        return {}
    names = [name for name in msgspec.structs.asdict(ledgers[0]) if name not in ("ttft_s", "total_s", "retries")]
    return {name: _mean([getattr(ledger, name) for ledger in ledgers]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
