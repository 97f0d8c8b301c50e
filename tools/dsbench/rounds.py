"""Loads of several rates in several rounds, so that no rate has the machine's bad minutes to itself.

Each round runs every rate once, in an order of its own. What belongs to a rate is put together afterwards. A load
beside which the machine was disturbed is run again, a few times at most; which of the tries counts is decided by
the disturbance alone, never by how the requests fared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from dsbench.disturbance import Disturbance
from dsbench.served import Served, serve_figures
from dssim.records import Record
from dstopology.resolved import Slo


@dataclass(frozen=True, slots=True)
class Turn:
    """One rate in one round."""

    round: int
    rate: float


@dataclass(frozen=True, slots=True)
class Tried:
    """One load, as it was."""

    records: Sequence[Record]
    disturbance: Disturbance
    #: the most that a request was sent late
    late_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """A turn that was taken."""

    turn: Turn
    #: that counts, and how many were made
    tried: Tried
    tries: int
    #: whether even the one that counts was disturbed beyond the bound
    disturbed: bool
    #: runs of the simulator with the same arrivals, which differ by chance
    predicted: Sequence[Sequence[Record]]


def turns(rates: Sequence[float], rounds: int, seed: int) -> list[Turn]:
    """In the order in which they are to be taken."""
    random = Random(seed)
    return [Turn(number, rate) for number in range(rounds) for rate in random.sample(rates, len(rates))]


def undisturbed(attempt: Callable[[], Tried], bound: float, repeats: int) -> tuple[Tried, int, bool]:
    """The first try within the bound, or of ``1 + repeats`` the least disturbed; how many; whether beyond it."""
    tries: list[Tried] = []
    while len(tries) <= repeats:
        tries.append(attempt())
        if tries[-1].disturbance.share <= bound:
            return tries[-1], len(tries), False
    return min(tries, key=lambda one: one.disturbance.share), len(tries), True


def in_a_row(loads: Iterable[Sequence[Record]]) -> list[Record]:
    """Loads as if each began when all of those before it had ended, and their requests were numbered through."""
    joined: list[Record] = []
    begins_s, number = 0.0, 0
    for records in loads:
        joined += [replace(one, at_s=begins_s + one.at_s, number=number + one.number) for one in records]
        begins_s = max((one.at_s + one.total_s for one in joined), default=0.0)
        number = len(joined)
    return joined


def pooled(parts: Iterable[Sequence[Record]], slo: Slo, warmup_s: float, rate: float, late_s: float) -> Served:
    """Figures of several loads of one rate as of one that was as long as all of them, warm-ups left out."""
    counted = [
        [replace(one, at_s=one.at_s - warmup_s) for one in records if one.at_s >= warmup_s] for records in parts
    ]
    return serve_figures(in_a_row(counted), slo, 0.0, rate, late_s)
