"""Confidence intervals of a run's figures by the moving-block bootstrap (Kuensch 1989).

Requests that arrive one after the other wait in the same queue, so they are resampled in runs of neighbours:
intervals that take them for independent would be too narrow near saturation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from dssim.statistics import Estimate

T = TypeVar("T")

#: resamples
DRAWS = 400
#: two-sided coverage of the intervals
COVERAGE = 0.95


def interval(values: Sequence[T], figure: Callable[[Sequence[T]], float], seed: int = 0) -> Estimate:
    """``figure`` of ``values``, which are in order of arrival, with its interval; never called for none of them."""
    count = len(values)
    if count < 2:
        return Estimate(figure(values), -math.inf, math.inf)
    length = min(count, math.ceil(2 * count ** (1 / 3)))
    random = Random(seed)
    drawn = sorted(figure(_resample(values, length, random)) for _ in range(DRAWS))
    tail = (1 - COVERAGE) / 2
    return Estimate(figure(values), drawn[int(tail * DRAWS)], drawn[min(DRAWS - 1, int((1 - tail) * DRAWS))])


def _resample(values: Sequence[T], length: int, random: Random) -> list[T]:
    made: list[T] = []
    while len(made) < len(values):
        begin = random.randrange(len(values) - length + 1)
        made += values[begin : begin + length]
    return made[: len(values)]


def percentile(percent: float) -> Callable[[Sequence[float]], float]:
    """A percentile (nearest rank) as a figure."""
    return lambda values: sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def share(values: Sequence[bool]) -> float:
    """The share of those that are true."""
    return sum(values) / len(values)
