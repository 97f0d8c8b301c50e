"""Algorithms 1 and 2 of the DistServe paper, as pure functions over a goodput oracle.

An oracle takes a parallelism (or a pair) and returns requests a second; the algorithms compare goodput per device.
Algorithm 1 (high node affinity, a fast network) optimises prefill and decode independently and replicates both to
the rate. Algorithm 2 (low affinity) keeps the prefill and decode segments of each pipeline stage in one node, so
that KV never crosses nodes, and evaluates pairs jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dskv.shards import stage_layers

#: slack for comparing sums of rates with a rate
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """Tensor and pipeline parallelism of one instance."""

    tp: int
    pp: int

    @property
    def devices(self) -> int:
        """Devices of the instance."""
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"TP {self.tp} PP {self.pp}"


def same_layers(layers: int, prefill_pp: int, decode_pp: int, nodes: int) -> bool:
    """Whether each of ``nodes`` has the same layers of both."""
    ends = [
        [stage_layers(layers, pp)[pp * node // nodes - 1][1] for node in range(1, nodes + 1)]
        for pp in (prefill_pp, decode_pp)
    ]
    return ends[0] == ends[1]


@dataclass(frozen=True, slots=True)
class Pair:
    """Segments of ``stages`` nodes, each holding one stage of prefill and of decode. PPs count within a node."""

    stages: int
    prefill: Parallel
    decode: Parallel

    @property
    def devices(self) -> int:
        """Devices of the pair."""
        return self.stages * (self.prefill.devices + self.decode.devices)

    def alike(self, layers: int) -> bool:
        """Whether each node has the same layers of both."""
        return same_layers(layers, self.whole_prefill.pp, self.whole_decode.pp, self.stages)

    @property
    def whole_prefill(self) -> Parallel:
        """Prefill's parallelism across its nodes."""
        return Parallel(self.prefill.tp, self.prefill.pp * self.stages)

    @property
    def whole_decode(self) -> Parallel:
        """Decode's parallelism across its nodes."""
        return Parallel(self.decode.tp, self.decode.pp * self.stages)


@dataclass(frozen=True, slots=True, order=True)
class Mixed:
    """A colocated instance: its parallelism, and the tokens of a step."""

    parallel: Parallel
    budget: int

    @property
    def devices(self) -> int:
        """Devices of the instance."""
        return self.parallel.devices

    def __str__(self) -> str:
        return f"{self.parallel}, {self.budget} tokens a step"


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and its goodput; ``exact`` is false where a bound alone ruled it out."""

    what: Parallel | Pair | Mixed
    rate: float
    exact: bool = True

    @property
    def per_device(self) -> float:
        """Requests a second and device."""
        return self.rate / self.what.devices


@dataclass(frozen=True, slots=True)
class High:
    """What Algorithm 1 found; a best of None has no goodput at all."""

    prefill: Tried | None
    decode: Tried | None
    tried_prefill: tuple[Tried, ...]
    tried_decode: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class Low:
    """What Algorithm 2 found."""

    best: Tried | None
    tried: tuple[Tried, ...]


def space(node_limit: int, devices_per_node: int) -> list[Parallel]:
    """The loops of Algorithm 1: TP within a node, PP up to all devices of ``node_limit`` nodes."""
    every = node_limit * devices_per_node
    return [Parallel(tp, pp) for tp in range(1, devices_per_node + 1) for pp in range(1, every // tp + 1)]


def unbounded(what: Parallel | Pair | Mixed) -> float:
    """Infinite."""
    return math.inf


def algorithm1(
    candidates: Iterable[Parallel],
    prefill_goodput: Callable[[Parallel], float],
    decode_goodput: Callable[[Parallel], float],
    prefill_bound: Callable[[Parallel], float] = unbounded,
    decode_bound: Callable[[Parallel], float] = unbounded,
    *,
    decodes: Iterable[Parallel] | None = None,
    reaches: tuple[Callable[[Parallel, float], bool], Callable[[Parallel, float], bool]] | None = None,
) -> High:
    """The best prefill and the best decode, each on its own; bounds as in :func:`algorithm2`. ``decodes``: the
    candidates for decode, where its devices are others. ``reaches``: as for :func:`pruned`, of each phase."""
    each = list(candidates)
    others = each if decodes is None else list(decodes)
    ahead, behind = (None, None) if reaches is None else reaches
    prefill = pruned(each, prefill_goodput, (prefill_bound,), ahead)
    decode = pruned(others, decode_goodput, (decode_bound,), behind)
    return High(best_of(prefill), best_of(decode), prefill, decode)


def algorithm2(
    pairs: Iterable[Pair],
    joint_goodput: Callable[[Pair], float],
    bounds: Sequence[Callable[[Pair], float]] = (unbounded,),
    reaches: Callable[[Pair, float], bool] | None = None,
) -> Low:
    """The best pair. ``bounds``, the cheapest first, must never be below ``joint_goodput``: a pair whose bound per
    device does not exceed the best goodput so far is not simulated, and the best is as good as without.
    ``reaches``: as for :func:`pruned`."""
    tried = pruned(list(pairs), joint_goodput, bounds, reaches)
    return Low(best_of(tried), tried)


What = TypeVar("What", Parallel, Pair, Mixed)


def pruned(
    each: Sequence[What],
    exact: Callable[[What], float],
    bounds: Sequence[Callable[[What], float]],
    reaches: Callable[[What, float], bool] | None = None,
) -> tuple[Tried, ...]:
    """Try the most promising first, and only those that bounds do not rule out.

    ``reaches``: whether a candidate does well at a rate; who does not do well at a rate that ties with the best is
    ruled out too, as goodput is the highest such rate.
    """
    tried: list[Tried] = []
    best = 0.0
    for one in sorted(each, key=lambda what: -bounds[0](what) / what.devices):
        tie = best * one.devices
        ruled_out = next((most for most in (bound(one) for bound in bounds) if most <= tie), None)
        if ruled_out is None and best and reaches is not None and not reaches(one, tie):
            ruled_out = tie
        if ruled_out is None:
            tried.append(Tried(one, exact(one)))
            best = max(best, tried[-1].per_device)
        else:
            tried.append(Tried(one, ruled_out, exact=False))
    return tuple(tried)


def pairs_of(node_limit: int, devices_per_node: int, allowed: Callable[[Parallel], bool]) -> list[Pair]:
    """The loops of Algorithm 2; ``allowed`` is asked about parallelisms across all nodes of an instance."""
    inside = space(1, devices_per_node)
    found = []
    for stages in range(1, node_limit + 1):
        fits = [one for one in inside if allowed(Parallel(one.tp, one.pp * stages))]
        found += [Pair(stages, p, d) for p in fits for d in fits if p.devices + d.devices <= devices_per_node]
    return found


def best_of(tried: Iterable[Tried]) -> Tried | None:
    """The most goodput per device; of equals the first, as in the paper's strict comparison."""
    best: Tried | None = None
    for one in tried:
        if one.exact and one.per_device > (best.per_device if best is not None else 0.0):
            best = one
    return best


def replicas(rate: float, goodput: float) -> int:
    """``ceil(R / goodput)``."""
    return max(1, math.ceil(rate / goodput - _ROUNDING))


def fill(prefills: Sequence[Tried], decodes: Sequence[Tried], devices: int) -> tuple[Tried, int, Tried, int] | None:
    """Instances and replicas for a cluster of ``devices`` and no wanted rate: the highest rate all of it can serve.

    The paper leaves this case out. Of equal rates the one with the fewest devices. None where nothing fits.
    """
    best, chosen = (0.0, 0), None
    for one in prefills:
        for n in range(1, devices // one.what.devices + 1):
            left = devices - n * one.what.devices
            for other in decodes:
                if other.what.devices > left or min(one.rate, other.rate) == 0.0:
                    continue
                m = min(left // other.what.devices, replicas(n * one.rate, other.rate))
                used = n * one.what.devices + m * other.what.devices
                score = (min(n * one.rate, m * other.rate), -used)
                if score > best:
                    best, chosen = score, (one, n, other, m)
    return chosen


def fill_kinds(
    prefills: Sequence[Tried], decodes: Sequence[Tried], each: int
) -> tuple[Tried, int, Tried, int] | None:
    """As :func:`fill`, for ``each`` devices of two kinds, one for each phase."""
    best, chosen = (0.0, 0), None
    for one in prefills:
        for other in decodes:
            most = each // one.what.devices, each // other.what.devices
            rate = min(most[0] * one.rate, most[1] * other.rate)
            if rate == 0.0:
                continue
            n, m = min(most[0], replicas(rate, one.rate)), min(most[1], replicas(rate, other.rate))
            score = rate, -(n * one.what.devices + m * other.what.devices)
            if score > best:
                best, chosen = score, (one, n, other, m)
    return chosen


def largest(tried: Sequence[Tried], count: int) -> list[Tried]:
    """The best by goodput per device, of those that have any and were not ruled out by a bound."""
    good = [one for one in tried if one.exact and one.rate > 0.0]
    return sorted(good, key=lambda one: -one.per_device)[:count]
