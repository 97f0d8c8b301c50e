"""How long the steps of an instance take: what every latency model gives, and DistServe's linear form.

A model is of one (model, device) pair; an :class:`Instance` of it has one TP and PP and is a
:class:`dssim.times.StepTimes` as well. Everything in seconds and tokens. With PP a step runs through ``stages``
stages one after the other, while others follow: ``prefill_stage_s`` is the time one batch holds one stage, and a
decode step means every running sequence makes one token, the batch split evenly over the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dsplan.errors import ProfileMismatch
from dssim.times import Sums


class Instance(Protocol):
    """Times of one instance."""

    @property
    def stages(self) -> int:
        """Pipeline stages."""

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        """How long ``count`` prompts, of ``tokens`` in all and ``squares`` sum of squares, hold one stage."""

    def decode_step_s(self, batch: int, tokens: int) -> float:
        """One token for each of ``batch`` sequences that hold ``tokens`` in all."""

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        """How long a stage is held by chunks of ``count`` prompts, of ``tokens`` in all, beside one token for each
        of ``batch`` sequences that hold ``context``. ``squares``: the sum of end^2 - start^2 over the chunks."""


class Latency(Protocol):
    """Times of one model on one device."""

    @property
    def source(self) -> str:
        """Where the numbers come from, for people."""

    def degrees(self) -> tuple[int, ...] | None:
        """TP degrees that are known; None for any."""

    def instance(self, tp: int, pp: int) -> Instance:
        """Raises :class:`ProfileMismatch` for a TP that the profile does not tell of."""


class Steps:
    """An :class:`Instance` as the simulator wants it (``dssim.times.StepTimes``)."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def prefill_s(self, lengths: Sequence[int]) -> float:
        """One prefill batch through all stages."""
        squares = sum(n * n for n in lengths)
        return self.instance.stages * self.instance.prefill_stage_s(sum(lengths), squares, len(lengths))

    def decode_s(self, context_lengths: Sequence[int]) -> float:
        """One token for every sequence."""
        return self.instance.decode_step_s(len(context_lengths), sum(context_lengths))

    def mixed_s(self, chunks: Sequence[tuple[int, int]], context_lengths: Sequence[int]) -> float:
        """Through all stages; ``context_lengths`` are those of one stage's batch."""
        tokens = sum(end - start for start, end in chunks)
        squares = sum(end * end - start * start for start, end in chunks)
        return self.summed_s(Sums(len(chunks), tokens, squares, len(context_lengths), sum(context_lengths)))

    def summed_s(self, step: Sums) -> float:
        """See :class:`dssim.times.SummedTimes`."""
        one, stages = self.instance, self.instance.stages
        if not step.sequences:
            return stages * one.prefill_stage_s(step.tokens, step.squares, step.chunks)
        if not step.chunks:
            return one.decode_step_s(stages * step.sequences, stages * step.context)
        return stages * one.mixed_stage_s(step.tokens, step.squares, step.chunks, step.sequences, step.context)


def saturating_tokens(instance: Instance, gain: float = 0.1, limit: int = 8192) -> int:
    """Lm: the shortest prompt (a multiple of 64) that doubling would make less than ``gain`` cheaper a token."""
    length = 64
    while length < limit:
        single = instance.prefill_stage_s(length, length * length, 1)
        double = instance.prefill_stage_s(2 * length, 2 * length * length, 2)
        if double / 2 > (1 - gain) * single:
            break
        length += 64
    return length


def missing_degree(source: str, tp: int, known: Sequence[int]) -> ProfileMismatch:
    """The error for a TP without a profile."""
    return ProfileMismatch(
        f"{source} has no times for TP {tp}, only for TP {', '.join(map(str, known)) or 'none'}",
        remedy="leave that TP out, or use --latency roofline, which covers any",
    )
