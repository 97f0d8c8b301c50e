"""From logits to tokens.

Invariants:

* A row's token depends on its own logits, sampling parameters, token lists and output position, on nothing else:
  not on the rest of the batch, not on what was computed before, not on who draws: the compiled kernels
  (``native/draw.h``) and torch (:mod:`dsengine.drawing`) find the same token. A sequence resumed from prompt and
  outputs goes on as if it had never stopped.
* When :func:`sample` raises, no state has moved: the same step can be asked for again, row by row.

Order: penalties, the ban on ends before ``min_tokens``, temperature, top-k, top-p, min-p, draw. At the border of
top-k and top-p, tokens with equal logits stay together, so that no order among ties matters.

A token's weight is its probability divided by that of the likeliest, in single precision, then rounded to a whole
number of 2⁻⁴⁴. Whole numbers, because their sums are the same in whatever order they are made.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dsengine import drawing
from dsengine.native.structs import MOST_LIKELIEST, CDraw
from dsengine.randomness import uniform
from dswire.errors import EngineFailed
from dswire.messages.client import Sampling

#: answers each row of logits ``[batch, vocab_size]`` float32; token -1 where they are not numbers
Drawing = Callable[[Tensor, Sequence[CDraw]], None]

#: what a temperature comes to in float32 is kept within, so that nothing is 0 / 0
_SCALES = (1e-37, 3e38)
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token."""

    token: int
    #: log-softmax of the model's own logits at ``token``; None when not asked for
    logprob: float | None = None
    #: (token, log-probability) of the likeliest ones, likeliest first, of equals the lower token first
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What the next token of one sequence depends on besides its logits."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        eos_ids: Iterable[int] = (),
    ) -> None:
        """Raises :class:`EngineFailed` for a sequence that draws at random and has no seed."""
        if sampling.temperature > 0 and sampling.seed is None:
            raise EngineFailed("a sequence with temperature > 0 came without a seed")
        self._sampling = sampling
        #: the same for who draws; its memory stays where it is
        self.draw = _asked(sampling)
        #: index of the token that is drawn next among the outputs
        self.position = len(output_ids)
        self._penalties = _Penalties(sampling, prompt_ids, output_ids) if _penalised(sampling) else None
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_ids))
        self._ends = array("i", sorted(token for token in ends if 0 <= token <= _MAX_INT32))
        self.draw.banned = self._ends.buffer_info()[0]
        self._tell()

    def push(self, token: int) -> None:
        """Move on behind ``token``."""
        self.position += 1
        if self._penalties is not None:
            self._penalties.count(token)
        self._tell()

    def _tell(self) -> None:
        """Bring :attr:`draw` up to what comes next."""
        draw, sampling = self.draw, self._sampling
        if sampling.seed is not None and sampling.temperature > 0:
            draw.uniform = uniform(sampling.seed, self.position)
        draw.banned_count = len(self._ends) if self.position < sampling.min_tokens else 0
        if self._penalties is not None:
            self._penalties.tell(draw)


class _Penalties:
    """The tokens of one sequence that its penalties are for, in memory that the kernels can read."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        prompt = prompt_ids if sampling.repetition_penalty != 1 else ()
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = array("i", self._places)
        self._counts = array("i", bytes(4 * len(self._places)))
        for token in output_ids:
            self.count(token)

    def count(self, token: int) -> None:
        """One more of ``token`` in the output."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def tell(self, draw: CDraw) -> None:
        """Where they are now."""
        draw.seen, draw.seen_count = self._tokens.buffer_info()
        draw.counts = self._counts.buffer_info()[0]


def sample(logits: Tensor, states: Sequence[SamplerState], draw: Drawing = drawing.draw) -> list[Sampled]:
    """One token for each row of ``logits`` ``[batch, vocab_size]`` float32; moves the states on.

    Raises :class:`EngineFailed` when logits are not numbers.
    """
    answers = [state.draw for state in states]
    draw(logits, answers)
    if bad := [row for row, answer in enumerate(answers) if answer.token < 0]:
        raise EngineFailed(
            f"the model gave logits that are not finite numbers for rows {bad} of a batch of {len(states)}",
            remedy="use dtype bfloat16 or float32 if it is float16; otherwise suspect the weights",
        )
    drawn = [_sampled(answer) for answer in answers]
    for state, sampled in zip(states, drawn, strict=True):
        state.push(sampled.token)
    return drawn


def _sampled(answer: CDraw) -> Sampled:
    if answer.likeliest < 0:
        return Sampled(answer.token)
    highest, log_total = answer.highest, math.log(answer.total / drawing.UNIT)
    listed = zip(answer.tokens[: answer.listed], answer.logits[: answer.listed], strict=True)
    top = tuple((token, logit - highest - log_total) for token, logit in listed)
    return Sampled(answer.token, answer.logit - highest - log_total, top)


def _asked(sampling: Sampling) -> CDraw:
    temperature, (least, most) = sampling.temperature, _SCALES
    return CDraw(
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        scale=min(max(math.log2(math.e) / temperature, least), most) if temperature > 0 else 0,
        top_k=min(sampling.top_k, _MAX_INT32),
        likeliest=-1 if sampling.logprobs is None else min(sampling.logprobs, MOST_LIKELIEST),
    )


def _penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)
