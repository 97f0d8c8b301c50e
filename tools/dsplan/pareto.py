"""The Pareto front of TTFT, TPOT and devices: systems that none beats in all three, at one rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dsplan.goodput import experience
from dsplan.oracles import Oracles
from dsplan.placement import Group, Plan, Spec
from dsplan.search import Mixed, Pair, Parallel, Tried, largest, replicas

#: of each list, the best that are looked at
MOST = 4
#: the percentile that is compared
PERCENT = 90
#: share of the chosen system's goodput at which systems are compared where no rate is wanted
LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Point:
    """A system at the rate. Seconds."""

    spec: Spec
    ttft_s: float
    tpot_s: float
    #: share of requests that met both objectives
    share: float
    #: whether no other system is as good in all and better in some of TTFT, TPOT and devices
    best: bool = False

    @property
    def measures(self) -> tuple[float, float, int]:
        """Less is better."""
        return self.ttft_s, self.tpot_s, self.spec.devices


def points(oracles: Oracles, plan: Plan) -> tuple[float, list[Point]]:
    """The rate, and every system that was looked at: those with the replicas that they need, and with one more."""
    question = plan.question
    rate = question.rate if question.rate is not None else plan.chosen.goodput.rate * LOAD
    found = []
    for spec in dict.fromkeys(_specs(plan, rate)):
        if spec.devices > question.devices or oracles.cap(spec) < rate:
            continue
        seen = experience(question.workload, rate, question.slo, oracles.units(spec))
        found.append(Point(spec, seen.ttft_s[PERCENT], seen.tpot_s[PERCENT], seen.share))
    return rate, mark(found)


def mark(each: Sequence[Point]) -> list[Point]:
    """The same, with the front marked."""
    marked = []
    for one in each:
        beaten = any(_beats(other.measures, one.measures) for other in each)
        marked.append(Point(one.spec, one.ttft_s, one.tpot_s, one.share, not beaten))
    return marked


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _specs(plan: Plan, rate: float) -> Iterator[Spec]:
    yield from (placed.spec for placed in plan.placements)
    if plan.high is not None:
        sides = largest(plan.high.tried_prefill, MOST), largest(plan.high.tried_decode, MOST)
        for ahead, behind, more in product(*sides, (0, 1)):
            yield Spec("high", _group(ahead, rate, more), _group(behind, rate, more))
    for one in largest(plan.low.tried, MOST) if plan.low is not None else ():
        assert isinstance(one.what, Pair)
        for n in (replicas(rate, one.rate), replicas(rate, one.rate) + 1):
            groups = Group(one.what.whole_prefill, n), Group(one.what.whole_decode, n)
            yield Spec("low", *groups, stages=one.what.stages)
    for one in largest(plan.mixed, MOST) if len(plan.question.kinds) == 1 else ():
        assert isinstance(one.what, Mixed)
        for n in (replicas(rate, one.rate), replicas(rate, one.rate) + 1):
            parallel = one.what.parallel
            groups = Group(parallel, 0), Group(parallel, n)
            yield Spec("", *groups, mode="colocated", budget=one.what.budget, kind=0)


def _group(one: Tried, rate: float, more: int) -> Group:
    assert isinstance(one.what, Parallel)
    return Group(one.what, replicas(rate, one.rate) + more)
