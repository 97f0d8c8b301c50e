"""Drawing tokens with torch, all rows at once, where there are no compiled kernels.

Invariant: for the same logits it answers as ``native/draw.h`` does, bit for bit, on every device: a weight is made
by the same operations, each rounded by itself, and everything else is done in whole numbers or by comparing.

Order and meaning of the parameters are told in :mod:`dsengine.sampler`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dsengine.native.structs import CDraw

#: of the likeliest token's weight
UNIT = 2.0**44
_LOG2_E = 1.44269504
#: 2^x between -1/2 and 1/2, relative error 2e-7, exactly 1 at 0; fitted to the least relative error
_POWERS = (1.3264816e-3, 9.6715120e-3, 5.5507336e-2, 2.4022242e-1, 6.9314700e-1, 1.0)
#: numbers of a row whose highest is found at once
_RUN = 128
#: a border is looked for among this many likeliest tokens before the whole vocabulary is sorted
_GLANCE = 1024
#: weights are made of so many numbers at once at most
_MOST_NUMBERS = 1 << 22


def draw(logits: Tensor, draws: Sequence[CDraw]) -> None:
    """Answer ``draws``, one for each row of ``logits`` ``[batch, vocab_size]`` float32."""
    # A sum is finite only if every term is, and costs a tenth of looking at each.
    finite = logits.sum(-1).isfinite().tolist()
    adjusted = adjust(logits, draws)
    tokens = highest(adjusted).tolist()
    random = [row for row, one in enumerate(draws) if one.scale > 0 and finite[row]]
    group = max(1, _MOST_NUMBERS // logits.shape[1])
    for first in range(0, len(random), group):
        rows = random[first : first + group]
        found = _drawn(adjusted[rows], [draws[row] for row in rows]).tolist()
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    for row, one in enumerate(draws):
        one.token = tokens[row] if finite[row] else -1
        if one.likeliest >= 0 and finite[row]:
            _tell_probabilities(logits[row], one)


def highest(logits: Tensor) -> Tensor:
    """The first of the highest of each row of ``[batch, vocab_size]``: ``[batch]``.

    As ``argmax``, which on a CPU takes several times as long: it keeps an index beside every number.
    """
    vocab = logits.shape[1]
    whole = vocab - vocab % _RUN
    if not whole or logits.device.type != "cpu":
        return logits.argmax(-1)
    runs = logits[:, :whole].reshape(len(logits), -1, _RUN)
    run, row = runs.amax(-1).argmax(-1), torch.arange(len(logits))
    found = run * _RUN + runs[row, run].argmax(-1)
    if whole == vocab:
        return found
    rest = logits[:, whole:].max(-1)
    return torch.where(rest.values > logits[row, found], whole + rest.indices, found)


def adjust(logits: Tensor, draws: Sequence[CDraw]) -> Tensor:
    """``logits`` with penalties and the ban on ends; ``logits`` itself where there are none.

    Repetition as in CTRL (arXiv 1909.05858) over prompt and output; presence and frequency as in OpenAI's API over
    the output.
    """
    rows = [row for row, one in enumerate(draws) if one.seen_count or one.banned_count]
    if not rows:
        return logits
    adjusted = logits.clone()
    for row in rows:
        _adjust_row(adjusted[row], draws[row])
    return adjusted


def _adjust_row(logits: Tensor, one: CDraw) -> None:
    def number(value: float) -> Tensor:
        return torch.tensor(value, device=logits.device, dtype=torch.float32)

    if one.seen_count:
        seen, counts = (_integers(at, one.seen_count).to(logits.device) for at in (one.seen, one.counts))
        values = logits[seen]
        if one.repetition != 1:
            penalty = number(one.repetition)
            values = torch.where(values > 0, values / penalty, values * penalty)
        less = number(one.presence) + number(one.frequency) * counts.float()
        logits[seen] = torch.where(counts > 0, values - less, values)
    if one.banned_count:
        banned = _integers(one.banned, one.banned_count)
        logits[banned[banned < len(logits)].to(logits.device)] = float("-inf")


def _integers(address: int, count: int) -> Tensor:
    return torch.tensor((ctypes.c_int32 * count).from_address(address)[:], dtype=torch.int64)


def weights(logits: Tensor, scale: Tensor) -> Tensor:
    """2^((logit - highest) * scale) of ``[rows, vocab_size]`` in whole 2⁻⁴⁴; ``scale`` ``[rows]`` float32."""
    x = ((logits - logits.amax(-1, keepdim=True)) * scale[:, None]).clamp(min=-64)
    whole = x.round()
    x = x - whole
    power = torch.full_like(x, _POWERS[0])
    for factor in _POWERS[1:]:
        power = power * x
        power = power + factor
    return torch.ldexp(power.double(), whole + 44).round().long()


def kept(logits: Tensor, draws: Sequence[CDraw]) -> Tensor:
    """:func:`weights` of what can be drawn of adjusted ``logits`` at a temperature above 0; 0 for all else."""
    scale = torch.tensor([one.scale for one in draws], device=logits.device, dtype=torch.float32)
    made = weights(logits, scale)
    if any(0 < one.top_k < logits.shape[1] or one.top_p < 1 for one in draws):
        made = made * (logits >= _borders(logits, made, draws)[:, None])
    if any(one.min_p > 0 for one in draws):
        made = made * (made >= _column([one.min_p * UNIT for one in draws], logits))
    return made


def _drawn(logits: Tensor, draws: Sequence[CDraw]) -> Tensor:
    """Inverse distribution function over token ids in order: ``[rows]``."""
    reach = kept(logits, draws).cumsum(-1)
    total = reach[:, -1:]
    # Rounding must not carry the target to the very end, where no token is.
    target = torch.minimum((total.double() * _column([one.uniform for one in draws], logits)).long(), total - 1)
    found = torch.searchsorted(reach, target, right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float64)[:, None]


def _borders(logits: Tensor, made: Tensor, draws: Sequence[CDraw]) -> Tensor:
    """The least logit of each row that top-k and top-p keep: ``[rows]``."""
    vocab = logits.shape[1]
    top_k = torch.tensor([one.top_k if 0 < one.top_k < vocab else vocab for one in draws], device=logits.device)
    enough = all(one.top_k <= _GLANCE for one in draws if 0 < one.top_k < vocab)
    for count in (_GLANCE, vocab) if enough and vocab > _GLANCE else (vocab,):
        values, order = logits.topk(count)
        kth = values.gather(1, (top_k[:, None] - 1).clamp(max=count - 1))
        border = torch.where(top_k[:, None] < vocab, kth, float("-inf"))
        total = (made * (logits >= border)).sum(-1, keepdim=True).double()
        needed = (total * _column([one.top_p for one in draws], logits)).ceil().clamp(min=1)
        reach = made.gather(1, order).cumsum(-1)
        at = torch.searchsorted(reach, torch.minimum(needed, total).long())
        partial = _column([one.top_p for one in draws], logits) < 1
        if count == vocab or not bool((partial & (at == count)).any()):
            break
    found = values.gather(1, at.clamp(max=count - 1))
    return torch.where(partial, found, border)[:, 0]


def _tell_probabilities(logits: Tensor, one: CDraw) -> None:
    """Of the model's own ``logits`` ``[vocab_size]``."""
    scale = torch.tensor([_LOG2_E], device=logits.device, dtype=torch.float32)
    one.total = int(weights(logits[None], scale).sum())
    one.highest, one.logit = float(logits.max()), float(logits[one.token])
    one.listed = min(one.likeliest, len(logits))
    if one.listed:
        border = logits.topk(one.listed).values[-1]
        candidates = (logits >= border).nonzero().flatten()
        pairs = zip(candidates.tolist(), logits[candidates].tolist(), strict=True)
        for place, (token, logit) in enumerate(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[: one.listed]):
            one.tokens[place], one.logits[place] = token, logit
