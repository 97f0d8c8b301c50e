"""Normalisation over the hidden dimension, or over a head's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class RmsNorm:
    """Root mean square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        if x.is_cuda:  # one kernel instead of six, which rounds once
            return functional.rms_norm(x, x.shape[-1:], self.weight, self._eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)


class RmsNormPlusOne:
    """Gemma's: the stored weight is what the factor has above one, and the product too is in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float() + 1.0
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        wide = x.float()
        if x.is_cuda:
            return functional.rms_norm(wide, x.shape[-1:], self.weight, self._eps).to(x.dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return (wide * scale * self.weight).to(x.dtype)


class LayerNorm:
    """arXiv 1607.06450."""

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._shape = (size,)
        self.weight = weight
        self.bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return functional.layer_norm(x, self._shape, self.weight, self.bias, self._eps)


AnyNorm = RmsNorm | RmsNormPlusOne | LayerNorm
