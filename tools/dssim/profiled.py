"""A simulated system with the times of a profile.

A profile may tell how much slower a step is while another instance of the same node is in one: two processes share
caches, memory bandwidth, and cores with their router. A step takes that longer for the part of it that another
instance is in a step as well: the rest of that one's step, and after it the share of time that it lately spent in
steps, since what it will do is not known. And it may tell how steps of one kind differ by chance
(:mod:`dssim.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dssim.express.run import run
from dssim.kernel import Kernel
from dssim.model import layout_of
from dssim.noise import Noisy
from dssim.records import Run
from dssim.system import System
from dssim.times import Chunk, StepTimes, beside, linear_times, noise, transfer_times
from dssim.workload import Arrival
from dstopology.resolved import Instance, Topology

#: how far back "lately" goes, in seconds
MEMORY_S = 0.5
#: multiples of it lie evenly between whole numbers, however many there are
GOLDEN = (math.sqrt(5) - 1) / 2


def system_of(topology: Topology, profile: str, *, seed: int = 0, **options: Any) -> System:
    """The system; ``options`` are :class:`System`'s. ``seed``: of chance in the times of steps; the first few lie
    evenly in what was measured of it.

    Raises :class:`BadInput` and what :class:`System` raises.
    """
    node, chance = Nodes(beside(profile)), noise(profile)
    begin = seed * GOLDEN % 1.0

    def times(instance: Instance) -> StepTimes:
        calm = linear_times(profile, instance.tp)
        noisy = Noisy(calm, chance, lambda: node.kernel.now, begin) if chance else calm
        return node.times(instance, noisy)

    system = System(
        topology,
        layout_of(topology),
        times,
        transfer_times(profile),
        **options,
    )
    node.kernel = system.kernel
    return system


def express(topology: Topology, profile: str, arrivals: Sequence[Arrival]) -> Run | None:
    """The run of that system, compiled; None where that cannot be (:mod:`dssim.express.run`)."""
    if beside(profile) or noise(profile):
        return None
    layout, transfers = layout_of(topology), transfer_times(profile)
    return run(topology, layout, lambda instance: linear_times(profile, instance.tp), transfers, arrivals)


@dataclass
class _Steps:
    """The steps of an instance, as its neighbours feel them."""

    until_s: float = 0.0
    #: of the time, lately
    share: float = 0.0

    def began(self, now: float, seconds: float) -> None:
        """A step begins."""
        if seconds <= 0.0:
            return
        cycle_s = max(now - self.until_s, 0.0) + seconds
        self.share += (1.0 - math.exp(-cycle_s / MEMORY_S)) * (seconds / cycle_s - self.share)
        self.until_s = max(self.until_s, now + seconds)

    def beside(self, now: float, seconds: float) -> float:
        """The part of a step of so many seconds that begins now and is not alone."""
        rest = min(max(self.until_s - now, 0.0) / seconds, 1.0)
        lately = self.share * math.exp(-max(now - self.until_s, 0.0) / MEMORY_S)
        return rest + (1.0 - rest) * lately


@dataclass
class Nodes:
    """Who is in a step, by node."""

    #: factors on "prefill" and "decode" steps
    slower: dict[str, float]
    kernel: Kernel = field(default_factory=Kernel)
    _steps: dict[str, dict[str, _Steps]] = field(default_factory=dict)

    def times(self, instance: Instance, alone: StepTimes) -> StepTimes:
        """The times of an instance that is not alone on its node."""
        if not self.slower:
            return alone
        node = self._steps.setdefault(instance.node, {})
        node[instance.name] = _Steps()
        return _Beside(instance.name, alone, self, node)


@dataclass
class _Beside:
    name: str
    alone: StepTimes
    nodes: Nodes
    node: dict[str, _Steps]

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill step."""
        return self._taken(self.alone.prefill_s(lengths), "prefill")

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One decode step."""
        return self._taken(self.alone.decode_s(context_lengths), "decode")

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        """One step of both, which is as sensitive as one of decode."""
        return self._taken(self.alone.mixed_s(chunks, context_lengths), "decode")

    def _taken(self, seconds: float, phase: str) -> float:
        if seconds <= 0.0:
            return seconds
        now = self.nodes.kernel.now
        part = sum(steps.beside(now, seconds) for name, steps in self.node.items() if name != self.name)
        seconds *= 1.0 + (self.nodes.slower.get(phase, 1.0) - 1.0) * min(part, 1.0)
        self.node[self.name].began(now, seconds)
        return seconds
