"""Rotary position embedding: the table of angles and its application.

Formulas: RoFormer (arXiv 2104.09864) in the half-split form of Llama checkpoints; the ``llama3`` scaling is that of
Llama 3.1, ``yarn`` that of arXiv 2309.00071, ``longrope`` that of arXiv 2402.13753. Angles are computed in float32
whatever the dtype of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsengine.rope_settings import Rope
from dswire.errors import UnsupportedModel

#: cosines and signed sines, each ``[tokens, 1, turned dimensions]``
Angles = tuple[Tensor, Tensor]


def inverse_frequencies(rope: Rope, size: int, max_len: int) -> Tensor:
    """``[size / 2]`` float32, radians per position, for ``size`` turned dimensions.

    ``longrope`` takes its short factors where ``max_len`` stays within the trained length, else the long ones
    for all positions: a cached key must not turn as its sequence grows. Raises :class:`UnsupportedModel` for
    ``dynamic`` beyond the trained length, where it would have to.
    """
    base: Tensor = rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope.kind == "linear":
        return 1.0 / base / rope.factor
    if rope.kind == "llama3":
        return _llama3(1.0 / base, rope)
    if rope.kind == "yarn":
        return _yarn(1.0 / base, rope, size)
    if rope.kind == "longrope":
        return _longrope(base, rope.long_factors if max_len > rope.original_len else rope.short_factors)
    if rope.kind == "dynamic" and max_len > rope.original_len:
        raise UnsupportedModel(
            f"rope type 'dynamic' beyond {rope.original_len} positions is not supported",
            remedy=f"set model.max_model_len to at most {rope.original_len}",
        )
    return 1.0 / base


def _longrope(base: Tensor, factors: tuple[float, ...]) -> Tensor:
    if len(factors) != len(base):
        raise UnsupportedModel(f"rope type 'longrope' has {len(factors)} factors for {len(base)} frequencies")
    return 1.0 / (torch.tensor(factors) * base)


def _yarn(inverse: Tensor, rope: Rope, size: int) -> Tensor:
    def dimension(turns: float) -> float:
        return size * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse / rope.factor * stretched + inverse * (1 - stretched)


def _llama3(inverse: Tensor, rope: Rope) -> Tensor:
    wavelength = 2 * math.pi / inverse
    stretched = inverse / rope.factor
    smooth = (rope.original_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * stretched + smooth * inverse
    long = wavelength > rope.original_len / rope.low_freq_factor
    short = wavelength < rope.original_len / rope.high_freq_factor
    return torch.where(long, stretched, torch.where(short, inverse, between))


class RopeTable:
    """Cosines and signed sines of every position."""

    def __init__(self, rope: Rope, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        size = int(head_dim * rope.fraction)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse_frequencies(rope, size, max_len))
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        self._size, self._half = size, size // 2
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)
        # The first half is subtracted in the rotation: its sign lives here, so that a roll does the rest.
        self._sin = torch.cat((-sin, sin), -1).to(device, dtype)

    def at(self, positions: Tensor) -> Angles:
        """Cosines and signed sines for ``positions`` ``[tokens]``."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """``x`` ``[tokens, heads, head_dim]`` turned by ``angles`` of :meth:`at`."""
        cos, sin = angles
        if self._size == x.shape[-1]:
            return torch.addcmul(x * cos, x.roll(self._half, -1), sin)
        turned, kept = x[..., : self._size], x[..., self._size :]
        return torch.cat((torch.addcmul(turned * cos, turned.roll(self._half, -1), sin), kept), -1)
