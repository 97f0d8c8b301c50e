"""A simulated system with the times of a profile.

Where a profile tells how much slower a step is while another instance of the same node is in one (two processes
share caches, memory bandwidth and the cores that their router needs), steps that begin meanwhile take that longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dssim.express.run import run
from dssim.kernel import Kernel
from dssim.model import layout_of
from dssim.records import Run
from dssim.system import System
from dssim.times import Chunk, StepTimes, beside, linear_times, transfer_times
from dssim.workload import Arrival
from dstopology.resolved import Instance, Topology


def system_of(topology: Topology, profile: str, **options: Any) -> System:
    """The system; ``options`` are :class:`System`'s. Raises :class:`BadInput` and what :class:`System` raises."""
    node = Nodes(beside(profile))
    system = System(
        topology,
        layout_of(topology),
        lambda instance: node.times(instance, linear_times(profile, instance.tp)),
        transfer_times(profile),
        **options,
    )
    node.kernel = system.kernel
    return system


def express(topology: Topology, profile: str, arrivals: Sequence[Arrival]) -> Run | None:
    """The run of that system, compiled; None where that cannot be (:mod:`dssim.express.run`)."""
    if beside(profile):
        return None
    layout, transfers = layout_of(topology), transfer_times(profile)
    return run(topology, layout, lambda instance: linear_times(profile, instance.tp), transfers, arrivals)


@dataclass
class Nodes:
    """Who is in a step until when, by node."""

    #: factors on "prefill" and "decode" steps
    slower: dict[str, float]
    kernel: Kernel = field(default_factory=Kernel)
    _until_s: dict[str, dict[str, float]] = field(default_factory=dict)

    def times(self, instance: Instance, alone: StepTimes) -> StepTimes:
        """The times of an instance that is not alone on its node."""
        if not self.slower:
            return alone
        until_s = self._until_s.setdefault(instance.node, {})
        until_s[instance.name] = 0.0
        return _Beside(instance.name, alone, self, until_s)


@dataclass
class _Beside:
    name: str
    alone: StepTimes
    nodes: Nodes
    until_s: dict[str, float]

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
        now = self.nodes.kernel.now
        if any(until_s > now for name, until_s in self.until_s.items() if name != self.name):
            seconds *= self.nodes.slower.get(phase, 1.0)
        self.until_s[self.name] = max(self.until_s[self.name], now + seconds)
        return seconds
