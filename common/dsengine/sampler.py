"""From logits to tokens.

Invariants:

* A row's token depends on its own logits, sampling parameters, token lists and output position, on nothing else:
  not on the rest of the batch, not on what was computed before. A sequence resumed from prompt and outputs goes on
  as if it had never stopped.
* When :func:`sample` raises, no state has moved: the same step can be asked for again, row by row.

Order: penalties, the ban on ends before ``min_tokens``, temperature, top-k, top-p, min-p, draw. At the border of
top-k and top-p, equally likely tokens stay together, so that no order among ties matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.randomness import uniform
from dswire.errors import EngineFailed
from dswire.messages.client import Sampling

#: numbers of a row whose highest is found at once
_RUN = 128
#: top-p looks at this many likeliest tokens, then at more, before it sorts the whole vocabulary
_TOP_P_GLANCES = (1024, 8192)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token."""

    token: int
    #: log-softmax of the model's own logits at ``token``; None when not asked for
    logprob: float | None = None
    #: (token, log-probability) of the likeliest ones, likeliest first
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
        self.sampling = sampling
        #: index of the token that is drawn next among the outputs
        self.position = len(output_ids)
        #: occurrences of each output token
        self.output_counts = Counter(output_ids)
        #: tokens of prompt and output
        self.seen = {*prompt_ids, *output_ids} if sampling.repetition_penalty != 1 else set()
        ends = set(sampling.stop_token_ids)
        #: tokens that may not come before ``min_tokens``
        self.ends = tuple(sorted(ends if sampling.ignore_eos else ends | set(eos_ids)))

    @property
    def plain(self) -> bool:
        """The next token is just the likeliest one, and nobody wants to know its probability."""
        s = self.sampling
        return s.temperature == 0 and s.logprobs is None and not (self.penalised or self.end_banned)

    @property
    def penalised(self) -> bool:
        """Some penalty is on."""
        s = self.sampling
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0

    @property
    def end_banned(self) -> bool:
        """The next token may not be one of ``ends``."""
        return self.position < self.sampling.min_tokens and bool(self.ends)

    def push(self, token: int) -> None:
        """Move on behind ``token``."""
        self.position += 1
        self.output_counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self.seen.add(token)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """One token for each row of ``logits`` ``[batch, vocab_size]`` float32; moves the states on.

    Raises :class:`EngineFailed` when logits are not numbers.
    """
    _refuse_non_finite(logits)
    likeliest = highest(logits).tolist() if any(state.plain for state in states) else []
    drawn = [
        Sampled(likeliest[row]) if state.plain else _sample_row(logits[row], state)
        for row, state in enumerate(states)
    ]
    for state, sampled in zip(states, drawn, strict=True):
        state.push(sampled.token)
    return drawn


def highest(logits: Tensor) -> Tensor:
    """The first of the highest of each row of ``[batch, vocab_size]``: ``[batch]``.

    As ``argmax``, which on a CPU takes several times as long: it keeps an index beside every number.
    """
    vocab = logits.shape[1]
    whole = vocab - vocab % _RUN
    if not whole or logits.device.type != "cpu":
        return logits.argmax(-1)
    runs = logits[:, :whole].view(len(logits), -1, _RUN)
    run, row = runs.amax(-1).argmax(-1), torch.arange(len(logits))
    found = run * _RUN + runs[row, run].argmax(-1)
    if whole == vocab:
        return found
    rest = logits[:, whole:].max(-1)
    return torch.where(rest.values > logits[row, found], whole + rest.indices, found)


def _refuse_non_finite(logits: Tensor) -> None:
    # A sum is finite only if every term is, and costs a tenth of looking at each.
    bad = (~logits.sum(-1).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise EngineFailed(
            f"the model gave logits that are not finite numbers for rows {bad} of a batch of {len(logits)}",
            remedy="use dtype bfloat16 or float32 if it is float16; otherwise suspect the weights",
        )


def _sample_row(raw: Tensor, state: SamplerState) -> Sampled:
    logits = adjust(raw, state)
    temperature = state.sampling.temperature
    token = int(logits.argmax()) if temperature == 0 else _draw(probabilities(logits, state.sampling), state)
    if state.sampling.logprobs is None:
        return Sampled(token)
    logprobs = raw.log_softmax(-1)
    return Sampled(token, float(logprobs[token]), _likeliest(logprobs, state.sampling.logprobs))


def adjust(raw: Tensor, state: SamplerState) -> Tensor:
    """``raw`` ``[vocab_size]`` with penalties and the ban on ends; ``raw`` itself where there are none.

    Repetition as in CTRL (arXiv 1909.05858) over prompt and output; presence and frequency as in OpenAI's API over
    the output.
    """
    s = state.sampling
    if not (state.penalised or state.end_banned):
        return raw
    logits = raw.clone()
    if s.repetition_penalty != 1 and state.seen:
        seen = torch.tensor(sorted(state.seen), device=raw.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and state.output_counts:
        tokens = torch.tensor(list(state.output_counts), device=raw.device)
        counts = torch.tensor(list(state.output_counts.values()), device=raw.device, dtype=logits.dtype)
        logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    if state.end_banned:
        logits[list(state.ends)] = float("-inf")
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """``[vocab_size]`` float64, not normalised: what :func:`sample` draws from, for temperature > 0."""
    # The maximum goes first, or a tiny temperature would overflow; one of 0 in float32 would give 0 / 0.
    scaled = (logits - logits.max()) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if 0 < sampling.top_k < len(scaled):
        border = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < border, float("-inf"))
    weights = scaled.softmax(-1, dtype=torch.float64)
    if sampling.top_p < 1:
        weights = weights.masked_fill(weights < _top_p_border(weights, sampling.top_p), 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.max(), 0)
    return weights


def _top_p_border(weights: Tensor, top_p: float) -> Tensor:
    """The smallest of the largest ``weights`` that together reach ``top_p``."""
    for count in (*_TOP_P_GLANCES, len(weights)):
        largest = weights.topk(min(count, len(weights))).values
        reached = (largest.cumsum(-1) >= top_p).nonzero()
        if len(reached):
            return largest[reached[0, 0]]
    return largest[-1]


def _draw(weights: Tensor, state: SamplerState) -> int:
    """Inverse distribution function over token ids in order."""
    seed = state.sampling.seed
    assert seed is not None  # held by SamplerState
    reach = weights.cumsum(-1)
    total = reach[-1]
    # Rounding must not carry the target to the very end, where no token is.
    target = torch.minimum(total * uniform(seed, state.position), torch.nextafter(total, torch.zeros_like(total)))
    return int(torch.searchsorted(reach, target, right=True))


def _likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    best = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
