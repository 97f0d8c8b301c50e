"""Steps whose times are not all alike: a model of times, and what a measured profile says of chance.

Each step takes as many times longer as one did that was measured. A slow moment of a machine is seldom alone, and
all its instances share it; so factors are not drawn one by one. What was measured is gone through in its own time,
from a moment on that chance chooses, and begins anew at its end: what followed upon each other does so here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dssim.times import Chunk, StepTimes

#: when a step was measured, and how many times as long as foretold it took; in order of time
Course = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Noisy:
    """The times of an instance, with chance."""

    calm: StepTimes
    #: by phase
    noise: Mapping[str, Course]
    #: seconds
    clock: Callable[[], float]
    #: where in what was measured the clock's 0 lies, as a part of the whole
    begin: float = 0.0

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill step."""
        return self.calm.prefill_s(lengths) * self._factor("prefill")

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One decode step."""
        return self.calm.decode_s(context_lengths) * self._factor("decode")

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        """One step of both, which is as noisy as one that only reads."""
        return self.calm.mixed_s(chunks, context_lengths) * self._factor("prefill" if chunks else "decode")

    def _factor(self, phase: str) -> float:
        """Of the step that was measured next to now."""
        course = self.noise.get(phase)
        if not course:
            return 1.0
        whole_s = self._whole_s()
        at_s = (self.clock() + self.begin * whole_s) % whole_s
        after = bisect_left(course, (at_s, 0.0))
        near = course[max(after - 1, 0)], course[min(after, len(course) - 1)]
        return min(near, key=lambda one: abs(one[0] - at_s))[1]

    def _whole_s(self) -> float:
        """From the first moment until it begins anew: the same for all phases."""
        return max(max(course[-1][0] for course in self.noise.values() if course), 1e-3)
