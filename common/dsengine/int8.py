"""Weights in int8: a byte each, and a scale for every 32 of a row; activations stay in the model's dtype.

Symmetric rounding to nearest, ``weight ~= scale * q``, where ``scale`` is the least number of bfloat16 with
``127 * scale >= max|group|``: no element is off by more than half a scale. Groups are counted from the first column
of the whole matrix, so that ranks that share it round as one would. Only matrices that activations are multiplied
with are quantised; embeddings, norms, biases and the routers of experts stay as they are.

Products here widen the matrix a piece at a time, which for few rows takes longer than the unquantised ones do; the
compiled kernels (native/int8.h) widen as they read. Up to :data:`BLOCK_ROWS` rows are computed as so many, so that
a decoded token does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsengine.linear import Cut

#: columns that have a scale in common; as ``GROUP`` in native/int8.h
GROUP = 32
#: the kernels keep sums in units of a scale: they must not overflow where weights are next to nothing
LEAST_SCALE = 2.0**-48
#: products of fewer rows are filled up to these
BLOCK_ROWS = 32
#: rows of the matrix that are widened, or rounded, at once
_PIECE_ROWS = 4096


class Int8Linear:
    """``y = x Wᵀ + b`` with ``W`` in int8."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> None:
        """``weight`` ``[out, in]`` on the CPU, ``bias`` ``[out]``."""
        self._q, scale = quantise(weight, cut)
        self._scale = scale.to(weight.dtype)
        self._before = before(cut)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        block = functional.pad(x, (0, 0, 0, max(BLOCK_ROWS - len(x), 0)))
        y = torch.cat([self._product(block, start) for start in range(0, len(self._q), _PIECE_ROWS)], -1)[: len(x)]
        return y if self._bias is None else y + self._bias

    def _product(self, x: Tensor, start: int) -> Tensor:
        piece = slice(start, start + _PIECE_ROWS)
        wide = widened(self._q[piece].to(x.dtype), self._scale[piece], self._before)
        return functional.linear(x, wide)


def before(cut: Cut | None) -> int:
    """Columns of the first group that are not here."""
    return 0 if cut is None else cut.start % GROUP


def quantise(weight: Tensor, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """``[out, in]`` -> int8 of the same shape, and scales ``[out, groups]`` in float32."""
    q, skipped = torch.empty(weight.shape, dtype=torch.int8), before(cut)
    scale = (peaks_of(weight) if cut is None else cut.peaks()) / 127
    scale = _rounded_up(scale.clamp_min(LEAST_SCALE))
    for start in range(0, len(weight), _PIECE_ROWS):
        piece = slice(start, start + _PIECE_ROWS)
        q[piece] = widened(weight[piece].float(), 1 / scale[piece], skipped).round_()
    return q, scale


def widened(q: Tensor, scale: Tensor, skipped: int = 0) -> Tensor:
    """``q`` ``[out, in]`` times the ``scale`` of its groups; ``skipped`` columns of the first are not there."""
    return q * scale.repeat_interleave(GROUP, 1)[:, skipped : skipped + q.shape[1]]


def peaks_of(weight: Tensor) -> Tensor:
    """max|group| ``[out, groups]`` in float32 of ``[out, in]``, groups beginning at its first column."""
    whole = functional.pad(weight, (0, -weight.shape[1] % GROUP))
    low, high = whole.view(len(weight), -1, GROUP).aminmax(dim=2)
    return torch.maximum(-low, high).float()


def _rounded_up(x: Tensor) -> Tensor:
    """The least number of bfloat16 that is not below ``x``, positive in float32."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
