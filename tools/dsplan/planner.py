"""From a question to a placement: runs the searches, sizes the replicas, and compares the best of each mode.

The searches compare candidates by the queueing oracle (:mod:`dsplan.queueing`, :mod:`dsplan.mixed`). What they
choose is then measured as a whole system, with the joint attainment of both objectives; the simulator has the last
word (:mod:`dsplan.confirm`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from dsobserve.terminal import digits
from dsplan import branches, reach
from dsplan.branches import Part
from dsplan.errors import DoesNotFit, PlanInput
from dsplan.goodput import Goodput
from dsplan.memory import fitting
from dsplan.oracles import Oracles
from dsplan.placement import Group, Placement, Plan, Spec
from dsplan.question import Question, check
from dsplan.search import (
    High,
    Low,
    Mixed,
    Pair,
    Parallel,
    Tried,
    algorithm1,
    algorithm2,
    best_of,
    fill,
    fill_kinds,
    pairs_of,
    pruned,
    replicas,
    space,
)

ORACLE = "queueing approximation (FCFS prefill recursion, fluid decode; dsplan.queueing)"
#: replicas added at most so that both objectives hold together
MOST_GROWTH = 16
#: times the cluster's devices up to which a rate is planned for
MOST_CLUSTERS = 16
#: tokens of a step of colocated instances that are tried
BUDGETS = (512, 2048)
#: quantiles of the prompt lengths that are tried as the threshold of mode conditional
QUANTILES = (0.25, 0.5, 0.75)
CONDITIONAL_BUDGET = 512
#: digits to which goodputs are told apart: beyond, the simpler system wins
DIGITS = 2

#: told of each stage of the search: what, how far, of how much
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


class Planner:
    """One question. Goodputs are kept, so that all searches share them."""

    def __init__(self, question: Question, progress: Progress = silent) -> None:
        check(question)
        self.question = question
        self.oracles = Oracles(question)
        self.progress = progress
        self.notes: list[str] = []
        #: parallelisms in mode colocated, and in others
        self.mixed = [self._allowed(kind, question.nodes) for kind in range(len(question.kinds))]
        self.allowed = self.mixed
        if question.instance_nodes < question.nodes:
            self.allowed = [self._allowed(kind, question.instance_nodes) for kind in range(len(question.kinds))]
            self.notes = list(dict.fromkeys(self.notes))

    def _allowed(self, kind: int, nodes: int) -> set[Parallel]:
        """Parallelisms over ``nodes`` that cut the model, have a profile, hold weights and the longest sequence."""
        question, shape, hardware = self.question, self.question.shape, self.question.kinds[kind]
        known = hardware.latency.degrees()
        cut = [
            (one.tp, one.pp)
            for one in space(nodes, question.devices_per_node)
            if shape.heads % one.tp == 0 and shape.layers % one.pp == 0
            if shape.kv_heads % one.tp == 0 or one.tp % shape.kv_heads == 0
            if known is None or one.tp in known
        ]
        if known is not None:
            self.notes.append(f"TP only of {', '.join(map(str, known))}: the latency profile has no others")
        fits = fitting(shape, hardware.device, cut, question.workload.longest)
        return {Parallel(tp, pp) for tp, pp in fits}

    def run(self, processes: int = 1) -> Plan:
        """Search, and measure what was found. Raises the errors of :mod:`dsplan.errors`.

        With ``processes`` the searches of algorithms and modes run beside each other; none changes its answer.
        """
        began = time.perf_counter()
        question = self.question
        if question.decode_hardware is None:
            reach.bounded(question, sorted(self.allowed[0]))
        self._check_rate()
        parts = branches.run(self, self._parts(), processes)
        self.notes += [note for part in parts for note in part.notes]
        placements = [one for part in parts for one in part.own] + [one for part in parts for one in part.derived]
        placements = [one for one in placements if one.spec.mode in question.modes and one.goodput.rate > 0]
        high = next((part.high for part in parts if part.high), None)
        low = next((part.low for part in parts if part.low), None)
        if not placements:
            self._explain()
        placements = _distinct(sorted(placements, key=self.order, reverse=True), question)
        chosen = placements[0]
        self._warn(placements)
        strict = self.oracles.goodput(chosen.spec, attainment=0.99, interval=False)
        mixed = tuple(one for part in parts for one in part.mixed)
        seconds = time.perf_counter() - began
        return Plan(question, chosen, placements, high, low, mixed, self.notes, seconds, strict)

    def _check_rate(self) -> None:
        """A rate that takes many times the cluster is a slip of the pen, and long to plan for."""
        rate, oracles = self.question.rate, self.oracles
        if rate is None:
            return
        prefill = max(oracles.prefill_cap(one) / one.devices for one in self.allowed[0])
        decode = max(oracles.decode_cap(one) / one.devices for one in self.allowed[-1])
        each = [1 / (1 / prefill + 1 / decode)]
        for kind, allowed in enumerate(self.mixed):
            each += [oracles.mixed_cap(Mixed(one, max(BUDGETS)), kind) / one.devices for one in allowed]
        least, room = math.ceil(rate / max(each)), self.question.devices
        if least > MOST_CLUSTERS * room:
            raise PlanInput(
                f"--rate {rate:g} takes {least} devices at the very least, and the cluster has {room}",
                remedy="give it more --nodes, or a lower rate",
            )

    def _parts(self) -> list[str]:
        """The searches that the question asks for."""
        wanted, question = self.question.algorithm, self.question
        apart = question.modes != ("colocated",)
        parts = ["high"] if apart and wanted in ("high", "auto") else []
        if apart and wanted in ("low", "auto") and question.decode_hardware is None:
            parts.append("low")
        return [*parts, "colocated"] if "colocated" in question.modes else parts

    def part(self, name: str) -> Part:
        """One of the searches, and the systems that it leads to."""
        before = len(self.notes)
        found = Part()
        if name == "colocated":
            found.mixed, found.own = self._colocated()
        elif name == "high":
            found.high = self._search_high()
            found.own = self._place_high(found.high)
        else:
            found.low = self._search_low()
            found.own = self._place_low(found.low)
        if name != "colocated" and "conditional" in self.question.modes:
            found.derived = [better for one in found.own for better in self._conditional(one)]
        found.notes, self.notes = self.notes[before:], self.notes[:before]
        return found

    def _explain(self) -> None:
        if self.question.decode_hardware is None:
            reach.explain(self.question)
        raise DoesNotFit(
            f"no prefill and decode instance fit together into {self.question.devices} devices, or none meets the "
            "objectives",
            remedy="allow more devices, or relax the objectives; one instance of each phase is the least",
        )

    def order(self, one: Placement) -> tuple[bool, float, int, bool]:
        """What the cluster holds comes first, then by worth; of equals the simplest mode, then the one whose KV
        stays in nodes."""
        simple = ("conditional", "disaggregated", "colocated").index(one.spec.mode)
        worth = float(f"{one.worth:.{DIGITS}g}")
        return self.question.has_room(one.spec), worth, simple, one.spec.algorithm == "low"

    def _warn(self, placements: list[Placement]) -> None:
        """Of what a wanted rate takes beyond the cluster."""
        question, chosen = self.question, placements[0]
        if not question.has_room(chosen.spec):
            self.notes.append(f"takes {chosen.spec.devices} devices, the cluster has {question.devices}")
            return
        large = [one for one in placements if one.worth > chosen.worth and not question.has_room(one.spec)]
        if large:
            best = max(large, key=lambda one: one.worth)
            self.notes.append(
                f"{best.spec} would serve {digits(best.per_device.rate)} a device, but takes {best.spec.devices} "
                f"devices, and the cluster has {question.devices}"
            )

    # the paper's algorithms

    def _search_high(self) -> High:
        oracles = self.oracles
        prefill, decode = sorted(self.allowed[0]), sorted(self.allowed[-1])
        bounds = oracles.prefill_cap, oracles.decode_cap
        steps = len(set(prefill) | set(decode)) * 2
        return algorithm1(
            prefill,
            self._counted("algorithm 1", steps, oracles.prefill_rate),
            self._counted("algorithm 1", steps, oracles.decode_rate),
            *bounds,
            decodes=decode,
            reaches=(
                lambda one, rate: oracles.reaches(oracles.of_prefill(one), rate),
                lambda one, rate: oracles.reaches(oracles.of_decode(one), rate),
            ),
        )

    def _search_low(self) -> Low:
        question, oracles = self.question, self.oracles
        pairs = pairs_of(question.nodes, question.devices_per_node, self.mixed[0].__contains__)
        if question.startable:
            layers = question.shape.layers
            pairs = [one for one in pairs if one.alike(layers)]
        counted = self._counted("algorithm 2", len(pairs), oracles.pair_rate)
        bounds = oracles.pair_cap, oracles.pair_bound
        return algorithm2(pairs, counted, bounds, lambda one, rate: oracles.reaches(oracles.of_pair(one), rate))

    def _counted(self, what: str, total: int, find: Callable[..., float]) -> Callable[..., float]:
        """``find``, which tells the progress; candidates that bounds rule out are not counted."""
        done = 0

        def found(*given: object) -> float:
            nonlocal done
            done += 1
            self.progress(what, done, total)
            return find(*given)

        return found

    def _place_high(self, found: High) -> list[Placement]:
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
        spec = Spec("high", Group(prefill.what, n), Group(decode.what, m))
        return [self.measured(self._grown(spec) if rate is not None else spec)]

    def _filled(self) -> tuple[Tried, int, Tried, int] | None:
        """Fill the cluster: bounds first, made exact where the choice rests on them, until it rests on none."""
        oracles, question = self.oracles, self.question
        prefills = {one: Tried(one, oracles.prefill_cap(one), exact=False) for one in sorted(self.allowed[0])}
        decodes = {one: Tried(one, oracles.decode_cap(one), exact=False) for one in sorted(self.allowed[-1])}
        while True:
            each = list(prefills.values()), list(decodes.values())
            two = question.decode_hardware is not None
            filled = fill_kinds(*each, question.each) if two else fill(*each, question.devices)
            if filled is None or (filled[0].exact and filled[2].exact):
                return filled
            for chosen, table, rate in (
                (filled[0].what, prefills, oracles.prefill_rate),
                (filled[2].what, decodes, oracles.decode_rate),
            ):
                assert isinstance(chosen, Parallel)
                table[chosen] = Tried(chosen, rate(chosen))

    def _place_low(self, found: Low) -> list[Placement]:
        if found.best is None or not isinstance(found.best.what, Pair):
            return []
        pair, question = found.best.what, self.question
        room = question.devices_per_node // (pair.devices // pair.stages) * (question.nodes // pair.stages)
        n = room if question.rate is None else replicas(question.rate, found.best.rate)
        if question.startable and n > room:
            return []
        groups = Group(pair.whole_prefill, n), Group(pair.whole_decode, n)
        return [self.measured(Spec("low", *groups, stages=pair.stages))]

    def _grown(self, spec: Spec) -> Spec:
        """Algorithm 1's replicas meet each objective on its own; add some until both hold together at the rate."""
        rate, added = self.question.rate or 0.0, 0
        seen = self.oracles.attained(spec, rate)
        while seen.share < self.question.slo.attainment and added < MOST_GROWTH:
            ahead = seen.ttft_misses >= seen.tpot_misses or seen.transfer_misses * 2 > seen.tpot_misses
            group = spec.prefill if ahead else spec.decode
            more = replace(group, replicas=group.replicas + 1)
            spec = replace(spec, prefill=more) if ahead else replace(spec, decode=more)
            seen, added = self.oracles.attained(spec, rate), added + 1
        if added:
            self.notes.append(
                f"high: {added} replicas more than the paper's ceil(R / goodput), so that both objectives "
                "hold for the same requests"
            )
        return spec

    # the other modes

    def _conditional(self, base: Placement) -> list[Placement]:
        """Short prompts read by decode instances, with the replicas of ``base``; where KV may go anywhere, also
        with one of prefill less."""
        prompts = sorted(prompt for _, prompt, _ in self.question.workload.requests)
        thresholds = sorted({prompts[int(len(prompts) * share)] for share in QUANTILES})
        whole = base.spec.prefill.replicas
        fewer = [whole, whole - 1] if base.spec.algorithm == "high" and whole > 1 else [whole]
        variants = [
            replace(
                base.spec,
                prefill=replace(base.spec.prefill, replicas=n),
                mode="conditional",
                threshold=threshold,
                budget=CONDITIONAL_BUDGET,
            )
            for threshold in thresholds
            for n in fewer
        ]
        best, best_rate = None, base.per_device.rate
        for number, spec in enumerate(variants):
            self.progress("conditional mode", number + 1, len(variants))
            least = max(best_rate * spec.devices, self.question.rate or 0.0)
            if least > self.oracles.cap(spec) or not self.oracles.reaches(self.oracles.units(spec), least):
                continue
            best, best_rate = spec, self.oracles.goodput(spec, interval=False).rate / spec.devices
        return [] if best is None else [self.measured(best)]

    def _colocated(self) -> tuple[tuple[Tried, ...], list[Placement]]:
        """The best instance that does both, on each kind of device, replicated."""
        every: list[Tried] = []
        placements = []
        for kind in range(len(self.question.kinds)):
            candidates = [Mixed(one, budget) for one in sorted(self.mixed[kind]) for budget in BUDGETS]

            def rate(one: Mixed, kind: int = kind) -> float:
                return self.oracles.mixed_rate(one, kind)

            def cap(one: Mixed, kind: int = kind) -> float:
                return self.oracles.mixed_cap(one, kind)

            def reaches(one: Mixed, wanted: float, kind: int = kind) -> bool:
                return self.oracles.reaches(self.oracles.of_mixed(one, kind), wanted)

            counted = self._counted("colocated mode", len(candidates), rate)
            tried = pruned(candidates, counted, (cap,), reaches)
            every += tried
            placements += self.place_colocated(best_of(tried), kind)
        return tuple(every), placements

    def place_colocated(self, best: Tried | None, kind: int) -> list[Placement]:
        """Replicas of an instance that does both, as many as the rate takes or the cluster holds; none of none."""
        if best is None or not isinstance(best.what, Mixed):
            return []
        question, one = self.question, best.what
        room = question.each // one.devices
        if one.devices <= question.devices_per_node:
            room = question.devices_per_node // one.devices * question.nodes
        n = room if question.rate is None else replicas(question.rate, best.rate)
        group = Group(one.parallel, 0), Group(one.parallel, n)
        return [self.measured(Spec("", *group, mode="colocated", budget=one.budget, kind=kind))]

    # measuring

    def measured(self, spec: Spec) -> Placement:
        """A system and what it can do."""
        oracles = self.oracles
        self.progress(f"measuring {spec}", 0, 1)
        found: Goodput = oracles.goodput(spec)
        beyond = oracles.attained(spec, max(found.rate, 0.01) * 1.1)
        saturated = ""
        if spec.mode == "colocated" and found.rate >= oracles.cap(spec):
            saturated = "both phases together"
        elif spec.mode == "disaggregated" and found.rate >= oracles.cap(spec):
            ahead = oracles.prefill_cap(spec.prefill.parallel) * spec.prefill.replicas
            behind = oracles.decode_cap(spec.decode.parallel) * spec.decode.replicas
            saturated = "prefill" if ahead < behind else "decode"
        return Placement(spec, found, beyond, saturated, self._price(spec))

    def _price(self, spec: Spec) -> float | None:
        if spec.mode == "colocated":
            name = self.question.kinds[spec.kind].device.name
            price = self.question.prices.get(name)
            return None if price is None else price * spec.devices
        return self.question.price(spec.prefill.devices, spec.decode.devices)


def _distinct(placements: list[Placement], question: Question) -> list[Placement]:
    """Each system once: on one node both algorithms may lead to the same."""
    if question.nodes > 1:
        return placements
    found = {replace(one.spec, algorithm=""): one for one in reversed(placements)}
    return list(reversed(found.values()))
