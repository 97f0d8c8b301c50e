"""From a question to a placement: builds the oracles, runs the search, sizes the replicas, and says why.

The search compares candidates by the queueing oracle (:mod:`dsplan.queueing`). The placement it chooses is then
measured as a whole, prefill and decode together, with the joint attainment of both objectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dsplan import capacity, reach
from dsplan.devices import Device
from dsplan.errors import DoesNotFit, PlanInput
from dsplan.goodput import LEAST_REQUESTS, MOST_RATE, Counts, Goodput, Slo, Workload, counts, goodput
from dsplan.latency import Latency, saturating_tokens
from dsplan.memory import fitting, memory
from dsplan.queueing import DecodeUnit, PrefillUnit
from dsplan.search import (
    High,
    Low,
    Pair,
    Parallel,
    Tried,
    algorithm1,
    algorithm2,
    fill,
    largest,
    pairs_of,
    replicas,
    space,
)
from dsplan.shapes import ModelShape

ORACLE = "queueing approximation (FCFS prefill recursion, fluid decode; dsplan.queueing), not the simulator"
#: sequences of a decode batch
MAX_BATCH = 512
#: replicas added at most so that both objectives hold together
MOST_GROWTH = 16


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned."""

    shape: ModelShape
    device: Device
    latency: Latency
    #: node limit of an instance, and the nodes of the cluster
    nodes: int
    devices_per_node: int
    workload: Workload
    slo: Slo
    #: high, low or auto
    algorithm: str = "auto"
    #: requests a second that are wanted; None fills the cluster
    rate: float | None = None

    @property
    def devices(self) -> int:
        """Of the cluster."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, slots=True)
class Group:
    """All replicas of one phase."""

    parallel: Parallel
    replicas: int

    @property
    def devices(self) -> int:
        """Of the group."""
        return self.parallel.devices * self.replicas


@dataclass(frozen=True, slots=True)
class Placement:
    """A system and its joint goodput."""

    algorithm: str
    prefill: Group
    decode: Group
    #: of the whole system
    goodput: Goodput
    #: what became of the requests a little above its goodput
    beyond: Counts
    #: the phase that cannot do more without end, where that and no objective limits the goodput; "" otherwise
    saturated: str
    #: stages that Algorithm 2 spread over nodes
    stages: int = 1

    @property
    def devices(self) -> int:
        """All."""
        return self.prefill.devices + self.decode.devices

    @property
    def per_device(self) -> Goodput:
        """Goodput per device."""
        one = self.goodput
        return Goodput(one.rate / self.devices, one.low / self.devices, one.high / self.devices)


@dataclass(slots=True)
class Plan:
    """The answer."""

    question: Question
    chosen: Placement
    #: one for each algorithm that ran
    placements: list[Placement]
    high: High | None
    low: Low | None
    notes: list[str] = field(default_factory=list)
    search_s: float = 0.0


def check(question: Question) -> None:
    """Raise :class:`PlanInput` for numbers that make no sense."""
    slo = question.slo
    limits = (
        ("nodes", question.nodes, 1, 4096),
        ("devices per node", question.devices_per_node, 1, 64),
        ("the TTFT objective in seconds", slo.ttft_s, 1e-6, 86_400),
        ("the TPOT objective in seconds", slo.tpot_s, 1e-6, 86_400),
        ("attainment", slo.attainment, 0.01, 0.9999),
        ("rate", 1.0 if question.rate is None else question.rate, 1e-3, 1e6),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise PlanInput(f"{name} {value:g} is absurd", remedy=f"give it between {low:g} and {high:g}")


class Planner:
    """One question. Goodputs are kept, so that both algorithms share them."""

    def __init__(self, question: Question) -> None:
        check(question)
        self.question = question
        self._kept: dict[tuple[str, Parallel], float] = {}
        self.allowed = self._allowed()

    def _allowed(self) -> set[Parallel]:
        """Parallelisms that cut the model, have a profile, and hold weights and the longest sequence."""
        question, shape = self.question, self.question.shape
        known = question.latency.degrees()
        cut = [
            (one.tp, one.pp)
            for one in space(question.nodes, question.devices_per_node)
            if shape.heads % one.tp == 0 and shape.kv_heads % one.tp == 0 and shape.layers % one.pp == 0
            if known is None or one.tp in known
        ]
        fits = fitting(shape, question.device, cut, question.workload.longest)
        return {Parallel(tp, pp) for tp, pp in fits}

    def run(self) -> Plan:
        """Search, and measure what was found. Raises the errors of :mod:`dsplan.errors`."""
        began = time.perf_counter()
        wanted = self.question.algorithm
        high = low = None
        placements: list[Placement] = []
        notes = ["colocated and conditional modes are not simulated in this release, and no candidates here"]
        if wanted in ("high", "auto"):
            high = algorithm1(
                sorted(self.allowed), self._prefill_rate, self._decode_rate, self._prefill_cap, self._decode_cap
            )
            placements += self._place_high(high, notes)
        if wanted in ("low", "auto"):
            pairs = pairs_of(self.question.nodes, self.question.devices_per_node, self.allowed.__contains__)
            low = algorithm2(pairs, self._pair_rate, (self._pair_cap, self._pair_bound))
            placements += self._place_low(low, notes)
        if not placements:
            reach.explain(self.question, sorted(self.allowed))
            raise DoesNotFit(
                f"no prefill and decode instance fit together into {self.question.devices} devices",
                remedy="allow more devices; one instance of each phase is the least",
            )
        # of equals the one whose KV stays inside nodes
        chosen = max(placements, key=lambda one: (float(f"{one.per_device.rate:.2g}"), one.algorithm == "low"))
        known = self.question.latency.degrees()
        if known is not None:
            notes.append(f"TP only of {', '.join(map(str, known))}: the latency profile has no others")
        return Plan(self.question, chosen, placements, high, low, notes, time.perf_counter() - began)

    # oracles

    def prefill_unit(self, one: Parallel, link_bytes_per_s: float = 0.0) -> PrefillUnit:
        """A prefill replica; a link of 0 takes no time."""
        instance = self.question.latency.instance(one.tp, one.pp)
        token_s = self.question.shape.kv_token_nbytes / link_bytes_per_s if link_bytes_per_s else 0.0
        return PrefillUnit(instance, saturating_tokens(instance), transfer_token_s=token_s)

    def decode_unit(self, one: Parallel) -> DecodeUnit:
        """A decode replica."""
        tokens = memory(self.question.shape, self.question.device, one.tp, one.pp).kv_tokens
        return DecodeUnit(self.question.latency.instance(one.tp, one.pp), tokens, MAX_BATCH * one.pp)

    def _rate(self, prefill: Sequence[PrefillUnit], decode: Sequence[DecodeUnit]) -> float:
        q = self.question
        found = goodput(
            lambda rate: counts(q.workload, rate, q.slo, prefill, decode),
            q.slo.attainment,
            most=self._cap(prefill, decode),
            interval=False,
        )
        return found.rate

    def _cap(self, prefill: Sequence[PrefillUnit], decode: Sequence[DecodeUnit]) -> float:
        """What the slower phase can do at most."""
        requests = self.question.workload.requests[:LEAST_REQUESTS]
        return min(
            sum(capacity.prefill_rate(one, requests) for one in prefill) or MOST_RATE,
            sum(capacity.decode_rate(one, requests) for one in decode) or MOST_RATE,
        )

    def _once(self, name: str, one: Parallel, find: Callable[[], float]) -> float:
        if (name, one) not in self._kept:
            self._kept[name, one] = find()
        return self._kept[name, one]

    def _prefill_cap(self, one: Parallel) -> float:
        return self._once("prefill cap", one, lambda: self._cap([self.prefill_unit(one)], []))

    def _decode_cap(self, one: Parallel) -> float:
        return self._once("decode cap", one, lambda: self._cap([], [self.decode_unit(one)]))

    def _pair_cap(self, pair: Pair) -> float:
        """Nothing is served faster than either phase can without end."""
        return min(self._prefill_cap(pair.whole_prefill), self._decode_cap(pair.whole_decode))

    def _prefill_rate(self, one: Parallel) -> float:
        """simu_prefill: TTFT only."""
        return self._once("prefill", one, lambda: self._rate([self.prefill_unit(one)], []))

    def _decode_rate(self, one: Parallel) -> float:
        """simu_decode: TPOT only."""
        return self._once("decode", one, lambda: self._rate([], [self.decode_unit(one)]))

    def _pair_rate(self, pair: Pair) -> float:
        link = self.question.device.node_bytes_per_s
        return self._rate([self.prefill_unit(pair.whole_prefill, link)], [self.decode_unit(pair.whole_decode)])

    def _pair_bound(self, pair: Pair) -> float:
        """Who meets both objectives meets TTFT, and TTFT does not depend on decode: never below the joint rate.

        Two bisections may differ by their precision, which is added.
        """
        return self._prefill_rate(pair.whole_prefill) * 1.03

    # replicas

    def _place_high(self, found: High, notes: list[str]) -> list[Placement]:
        prefill, decode, rate = found.prefill, found.decode, self.question.rate
        if prefill is None or decode is None:
            return []
        if rate is None:
            filled = self._filled()
            if filled is None:
                return []
            prefill, n, decode, m = filled
        else:
            n, m = replicas(rate, prefill.rate), replicas(rate, decode.rate)
        assert isinstance(prefill.what, Parallel)
        assert isinstance(decode.what, Parallel)
        place = self._grown if rate is not None else self._measured
        return [place("high", Group(prefill.what, n), Group(decode.what, m), notes)]

    def _filled(self) -> tuple[Tried, int, Tried, int] | None:
        """Fill the cluster: bounds first, made exact where the choice rests on them, until it rests on none."""
        each = sorted(self.allowed)
        prefills = {one: Tried(one, self._prefill_cap(one), exact=False) for one in each}
        decodes = {one: Tried(one, self._decode_cap(one), exact=False) for one in each}
        while True:
            filled = fill(list(prefills.values()), list(decodes.values()), self.question.devices)
            if filled is None or (filled[0].exact and filled[2].exact):
                return filled
            for chosen, table, rate in (
                (filled[0].what, prefills, self._prefill_rate),
                (filled[2].what, decodes, self._decode_rate),
            ):
                assert isinstance(chosen, Parallel)
                table[chosen] = Tried(chosen, rate(chosen))

    def _place_low(self, found: Low, notes: list[str]) -> list[Placement]:
        if found.best is None or not isinstance(found.best.what, Pair):
            return []
        pair, rate = found.best.what, self.question.rate
        room = (
            self.question.devices_per_node // (pair.devices // pair.stages) * (self.question.nodes // pair.stages)
        )
        n = room if rate is None else replicas(rate, found.best.rate)
        groups = Group(pair.whole_prefill, n), Group(pair.whole_decode, n)
        return [replace(self._measured("low", *groups, notes), stages=pair.stages)]

    def _system(self, algorithm: str, prefill: Group, decode: Group) -> tuple[list[PrefillUnit], list[DecodeUnit]]:
        device = self.question.device
        near = algorithm == "low" or self.question.nodes == 1
        link = device.node_bytes_per_s if near else device.network_bytes_per_s
        return (
            [self.prefill_unit(prefill.parallel, link)] * prefill.replicas,
            [self.decode_unit(decode.parallel)] * decode.replicas,
        )

    def _attained(self, algorithm: str, prefill: Group, decode: Group, rate: float) -> Counts:
        units = self._system(algorithm, prefill, decode)
        return counts(self.question.workload, rate, self.question.slo, *units)

    def _measured(self, algorithm: str, prefill: Group, decode: Group, notes: list[str]) -> Placement:
        found = goodput(
            lambda rate: self._attained(algorithm, prefill, decode, rate),
            self.question.slo.attainment,
            most=(cap := self._cap(*self._system(algorithm, prefill, decode))),
        )
        beyond = self._attained(algorithm, prefill, decode, max(found.rate, 0.01) * 1.1)
        saturated = ""
        if found.rate >= cap:
            ahead = self._prefill_cap(prefill.parallel) * prefill.replicas
            behind = self._decode_cap(decode.parallel) * decode.replicas
            saturated = "prefill" if ahead < behind else "decode"
        placed = Placement(algorithm, prefill, decode, found, beyond, saturated)
        if self.question.rate is not None and placed.devices > self.question.devices:
            notes.append(f"{algorithm}: takes {placed.devices} devices, the cluster has {self.question.devices}")
        return placed

    def _grown(self, algorithm: str, prefill: Group, decode: Group, notes: list[str]) -> Placement:
        """Algorithm 1's replicas meet each objective on its own; add some until both hold together at the rate."""
        rate, added = self.question.rate or 0.0, 0
        seen = self._attained(algorithm, prefill, decode, rate)
        while seen.share < self.question.slo.attainment and added < MOST_GROWTH:
            if seen.ttft_misses >= seen.tpot_misses or seen.transfer_misses * 2 > seen.tpot_misses:
                prefill = replace(prefill, replicas=prefill.replicas + 1)
            else:
                decode = replace(decode, replicas=decode.replicas + 1)
            seen, added = self._attained(algorithm, prefill, decode, rate), added + 1
        if added:
            notes.append(
                f"high: {added} replicas more than the paper's ceil(R / goodput), so that both objectives "
                "hold for the same requests"
            )
        return self._measured(algorithm, prefill, decode, notes)


def best_tried(plan: Plan, count: int = 8) -> list[tuple[str, Tried]]:
    """The best candidates of every list, with the list's name."""
    lists: list[tuple[str, tuple[Tried, ...]]] = []
    if plan.high is not None:
        lists += [("prefill", plan.high.tried_prefill), ("decode", plan.high.tried_decode)]
    if plan.low is not None:
        lists.append(("pair", tuple(one for one in plan.low.tried if one.exact)))
    return [(name, one) for name, tried in lists for one in largest(tried, count)]
