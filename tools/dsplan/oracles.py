"""What instances and systems can do, by the queueing oracle: units, bounds and goodputs, kept once found."""

from __future__ import annotations

from collections.abc import Callable

from dsplan import capacity
from dsplan.goodput import (
    LEAST_REQUESTS,
    LONG,
    MOST_RATE,
    PRECISION,
    Counts,
    Goodput,
    Units,
    counts,
    goodput,
    highest,
)
from dsplan.latency import Instance, saturating_tokens
from dsplan.memory import STEP_TOKENS, memory
from dsplan.mixed import MixedUnit
from dsplan.placement import Group, Spec
from dsplan.question import Question
from dsplan.queueing import DecodeUnit, PrefillUnit
from dsplan.search import Mixed, Pair, Parallel

#: sequences of a decode batch
MAX_BATCH = 512
#: share of a goodput that long runs are first tried at
LASTING = 0.92
#: two bisections may differ by their precision: what is added where one bounds the other
SLACK = 1.03
#: replicas of a colocated system that are followed; more are as many times as good, which leaves out what they gain
#: by evening out bursts
MOST_FOLLOWED = 4


def step_tokens(question: Question, instance: Instance) -> int:
    """Tokens of a prefill step: Lm, and more where prompts are longer, as each chunk pays what is fixed anew."""
    longest = max(prompt for _, prompt, _ in question.workload.requests)
    return max(saturating_tokens(instance), min(longest, STEP_TOKENS))


class Oracles:
    """Of one question."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._kept: dict[tuple[object, ...], float] = {}

    # units

    def prefill_unit(self, one: Parallel, link_bytes_per_s: float = 0.0) -> PrefillUnit:
        """A prefill replica; a link of 0 takes no time."""
        instance = self.question.latency.instance(one.tp, one.pp)
        token_s = self.question.shape.kv_token_nbytes / link_bytes_per_s if link_bytes_per_s else 0.0
        return PrefillUnit(instance, step_tokens(self.question, instance), transfer_token_s=token_s)

    def decode_unit(self, one: Parallel) -> DecodeUnit:
        """A decode replica."""
        hardware = self.question.kinds[-1]
        tokens = memory(self.question.shape, hardware.device, one.tp, one.pp).kv_tokens
        return DecodeUnit(hardware.latency.instance(one.tp, one.pp), tokens, MAX_BATCH * one.pp)

    def mixed_unit(self, one: Parallel, budget: int, kind: int = -1) -> MixedUnit:
        """A replica that reads prompts as well."""
        hardware = self.question.kinds[kind]
        tokens = memory(self.question.shape, hardware.device, one.tp, one.pp).kv_tokens
        return MixedUnit(hardware.latency.instance(one.tp, one.pp), tokens, MAX_BATCH * one.pp, budget)

    def units(self, spec: Spec) -> Units:
        """The replicas of a system."""
        question, decode = self.question, spec.decode
        if spec.mode == "colocated":
            return Units(mixed=(self.mixed_unit(decode.parallel, spec.budget, spec.kind),) * decode.replicas)
        near = spec.algorithm == "low" or (question.nodes == 1 and question.decode_hardware is None)
        devices = [one.device for one in question.kinds]
        link = min(one.node_bytes_per_s if near else one.network_bytes_per_s for one in devices)
        prefill = (self.prefill_unit(spec.prefill.parallel, link),) * spec.prefill.replicas
        if spec.mode == "conditional":
            mixed = (self.mixed_unit(decode.parallel, spec.budget),) * decode.replicas
            return Units(prefill, mixed=mixed, threshold=spec.threshold)
        return Units(prefill, (self.decode_unit(decode.parallel),) * decode.replicas)

    # systems

    def attained(self, spec: Spec, rate: float) -> Counts:
        """What becomes of the requests."""
        return counts(self.question.workload, rate, self.question.slo, self.units(spec))

    def goodput(self, spec: Spec, *, attainment: float | None = None, interval: bool = True) -> Goodput:
        """Of a system; ``attainment`` other than the question's. With the interval, long runs hold it as well."""
        times = 1.0
        if spec.mode == "colocated" and spec.decode.replicas > MOST_FOLLOWED:
            times = spec.decode.replicas / MOST_FOLLOWED
            few = Group(spec.decode.parallel, MOST_FOLLOWED)
            spec = Spec("", Group(few.parallel, 0), few, spec.mode, budget=spec.budget, kind=spec.kind)
        units = self.units(spec)
        one = self._goodput(units, attainment, self.cap(spec), interval=interval)
        if interval:
            one = self._lasting(one, units)
        return Goodput(one.rate * times, one.low * times, one.high * times)

    def cap(self, spec: Spec) -> float:
        """What the system can do without end."""
        decode = spec.decode
        if spec.mode == "colocated":
            # the same product as in goodput, to the last bit
            few = min(decode.replicas, MOST_FOLLOWED)
            cap = self.mixed_cap(Mixed(decode.parallel, spec.budget), spec.kind) * few
            return cap * (decode.replicas / few if decode.replicas > few else 1.0)
        behind = self.decode_cap(decode.parallel) * decode.replicas
        if spec.mode == "conditional":
            return behind
        return min(self.prefill_cap(spec.prefill.parallel) * spec.prefill.replicas, behind)

    def _lasting(self, found: Goodput, units: Units) -> Goodput:
        """What long runs leave of a goodput."""
        q = self.question

        def holds(rate: float) -> bool:
            return counts(q.workload, rate, q.slo, units, LONG).share >= q.slo.attainment

        low = high = found.rate
        if low and not holds(low):
            low *= LASTING
            if not holds(low):
                low = highest(holds, low / 2, low)
            while high - low > PRECISION * high:
                middle = (low + high) / 2
                low, high = (middle, high) if holds(middle) else (low, middle)
        return Goodput(low, min(found.low, low), found.high)

    def _goodput(self, units: Units, attainment: float | None, most: float, *, interval: bool = False) -> Goodput:
        q = self.question
        target = q.slo.attainment if attainment is None else attainment
        return goodput(
            lambda rate: counts(q.workload, rate, q.slo, units),
            target,
            most=min(most, MOST_RATE),
            interval=interval,
        )

    def reaches(self, units: Units, rate: float) -> bool:
        """Whether enough requests meet both objectives at a rate."""
        q = self.question
        return counts(q.workload, rate, q.slo, units).share >= q.slo.attainment

    # bounds and goodputs of single instances, each found once

    def _once(self, key: tuple[object, ...], find: Callable[[], float]) -> float:
        if key not in self._kept:
            self._kept[key] = find()
        return self._kept[key]

    def prefill_cap(self, one: Parallel) -> float:
        """No prefill instance of this parallelism serves more without end."""
        requests = self.question.workload.requests[:LEAST_REQUESTS]
        return self._once(("prefill cap", one), lambda: capacity.prefill_rate(self.prefill_unit(one), requests))

    def decode_cap(self, one: Parallel) -> float:
        """No decode instance does."""
        requests = self.question.workload.requests[:LEAST_REQUESTS]
        return self._once(("decode cap", one), lambda: capacity.decode_rate(self.decode_unit(one), requests))

    def mixed_cap(self, one: Mixed, kind: int = -1) -> float:
        """No colocated instance does: it has to read every prompt, and to make every token, in steady state."""

        def find() -> float:
            requests = self.question.workload.requests[:LEAST_REQUESTS]
            unit = self.mixed_unit(one.parallel, one.budget, kind)
            bounds = capacity.mixed_rate(unit.instance, requests), capacity.decode_rate(unit, requests)
            return min(*bounds, capacity.steady_rate(unit, requests))

        return self._once(("mixed cap", one, kind), find)

    def pair_cap(self, pair: Pair) -> float:
        """Nothing is served faster than either phase can without end."""
        return min(self.prefill_cap(pair.whole_prefill), self.decode_cap(pair.whole_decode))

    def of_prefill(self, one: Parallel) -> Units:
        """simu_prefill: TTFT only."""
        return Units((self.prefill_unit(one),))

    def of_decode(self, one: Parallel) -> Units:
        """simu_decode: TPOT only."""
        return Units(decode=(self.decode_unit(one),))

    def of_mixed(self, one: Mixed, kind: int = -1) -> Units:
        """A colocated instance: both objectives."""
        return Units(mixed=(self.mixed_unit(one.parallel, one.budget, kind),))

    def of_pair(self, pair: Pair) -> Units:
        """A pair of Algorithm 2: both objectives."""
        link = self.question.device.node_bytes_per_s
        return Units((self.prefill_unit(pair.whole_prefill, link),), (self.decode_unit(pair.whole_decode),))

    def prefill_rate(self, one: Parallel) -> float:
        """Goodput of :meth:`of_prefill`."""
        units, cap = self.of_prefill(one), self.prefill_cap(one)
        return self._once(("prefill", one), lambda: self._goodput(units, None, cap).rate)

    def decode_rate(self, one: Parallel) -> float:
        """Goodput of :meth:`of_decode`."""
        units, cap = self.of_decode(one), self.decode_cap(one)
        return self._once(("decode", one), lambda: self._goodput(units, None, cap).rate)

    def mixed_rate(self, one: Mixed, kind: int = -1) -> float:
        """Goodput of :meth:`of_mixed`."""
        return self._goodput(self.of_mixed(one, kind), None, self.mixed_cap(one, kind)).rate

    def pair_rate(self, pair: Pair) -> float:
        """Goodput of :meth:`of_pair`."""
        return self._goodput(self.of_pair(pair), None, self.pair_cap(pair)).rate

    def pair_bound(self, pair: Pair) -> float:
        """Who meets both objectives meets TTFT, and TTFT does not depend on decode: never below the joint rate."""
        return self.prefill_rate(pair.whole_prefill) * SLACK
