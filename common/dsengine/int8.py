"""Weights in int8: one byte each, one scale for each row of the matrix; activations stay in the model's dtype.

Symmetric rounding to nearest, ``weight ~= scale * q`` with ``scale = max|row| / 127``: no element is off by more
than half a scale. Only matrices that activations are multiplied with are quantised; embeddings, norms, biases and
the routers of experts stay as they are.

Up to :data:`KERNEL_ROWS` rows of bfloat16 or float16 go through torch's kernel for mixed types, row by row, so that
a decoded token does not depend on its batch. Other products widen the matrix a piece at a time: slower for few rows
(float32 decoding reads every weight and widens it), and near the unquantised product for many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsengine.linear import Peaks

#: rows up to which torch's kernel beats widening the matrix (measured with AVX-512 and AMX)
KERNEL_ROWS = 32
#: rows of the matrix that are widened at once
_WIDEN_ROWS = 4096
#: the kernel reads this many columns at a time, beyond the end of a row if need be: it takes multiples only
_KERNEL_COLUMNS = 16


class Int8Linear:
    """``y = x Wᵀ + b`` with ``W`` in int8."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, peaks: Peaks | None = None) -> None:
        """``weight`` ``[out, in]`` on the CPU, ``bias`` ``[out]``."""
        self._q, scale = quantise(weight, peaks)
        self._scale = scale.to(weight.dtype)
        self._bias = bias
        self._has_kernel = weight.dtype != torch.float32 and weight.shape[1] % _KERNEL_COLUMNS == 0

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        if self._has_kernel and len(x) <= KERNEL_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._q, self._scale)
        else:
            y = torch.cat([self._widened(x, start) for start in range(0, len(self._q), _WIDEN_ROWS)], -1)
        return y if self._bias is None else y + self._bias

    def _widened(self, x: Tensor, start: int) -> Tensor:
        piece = slice(start, start + _WIDEN_ROWS)
        return functional.linear(x, self._q[piece].to(x.dtype) * self._scale[piece, None])


def quantise(weight: Tensor, peaks: Peaks | None = None) -> tuple[Tensor, Tensor]:
    """``[out, in]`` -> int8 of the same shape, and the scale of each row ``[out]`` in float32.

    With ``peaks`` the scales are those of the whole matrix: ranks that share its columns have the same ones.
    """
    wide = weight.float()
    scale = (peaks_of(wide) if peaks is None else peaks()) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def peaks_of(weight: Tensor) -> Tensor:
    """max|row| of ``[out, in]``, in float32."""
    low, high = weight.aminmax(dim=1)
    return torch.maximum(-low, high).float()
