"""The one place where a matrix of weights meets activations.

On CPU the weights are packed once into oneDNN's blocked layout: two to four times quicker than
``torch.nn.functional.linear`` for the few rows of a decode step, and there a row's result does not depend on how
many rows come with it. Where that is not to be had (other devices, float16 without CPU support), plain linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

#: rows that the packed layout is tuned for: a decode batch
_PACK_ROWS = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """Which columns of a matrix are here, where other places have the others, for those that quantise (int8.py)."""

    #: the first of them
    start: int
    #: max|group| ``[out, groups]`` in float32 of all groups that they belong to
    peaks: Callable[[], Tensor]


class AnyLinear(Protocol):
    """What a matrix of weights is to the parts of a model."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        ...


class Linear:
    """``y = x Wᵀ + b``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> None:
        """``weight`` ``[out, in]``, ``bias`` ``[out]``; ``cut`` is of no use here."""
        packed = _pack(weight)
        self._packed = packed is not None
        self._weight = weight if packed is None else packed
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self._bias)


def _pack(weight: Tensor) -> Tensor | None:
    """``weight`` in oneDNN's layout, or None where this build or CPU has none for its dtype."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not available:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    except (AttributeError, RuntimeError):
        return None
    return packed
