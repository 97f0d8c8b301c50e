"""Steps whose times are not all alike: a model of times, and what a measured profile says of chance.

Each step takes as many times longer as one of those that were measured, each as likely as the others, so a machine
that halts now and then does so in the simulation. Draws do not know of each other: a machine that is slow for a
minute is told by other times, not by this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from dssim.times import Chunk, StepTimes


@dataclass(frozen=True, slots=True)
class Noisy:
    """The times of an instance, with chance."""

    calm: StepTimes
    #: phase -> how many times as long a step may take
    noise: Mapping[str, Sequence[float]]
    random: Random

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill step."""
        return self._drawn(self.calm.prefill_s(lengths), "prefill")

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One decode step."""
        return self._drawn(self.calm.decode_s(context_lengths), "decode")

    def mixed_s(self, chunks: Sequence[Chunk], context_lengths: Sequence[int]) -> float:
        """One step of both, which is as noisy as one that only reads."""
        return self._drawn(self.calm.mixed_s(chunks, context_lengths), "prefill" if chunks else "decode")

    def _drawn(self, seconds: float, phase: str) -> float:
        factors = self.noise.get(phase)
        return seconds * self.random.choice(factors) if factors else seconds
