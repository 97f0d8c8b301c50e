"""Rotary position embedding: the table of angles and its application.

Formulas: RoFormer (arXiv 2104.09864) in the half-split form of Llama checkpoints; the ``llama3`` scaling is that of
Llama 3.1. Angles are computed in float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsengine.architecture import Rope
from dswire.errors import UnsupportedModel


def inverse_frequencies(rope: Rope, head_dim: int, max_len: int) -> Tensor:
    """``[head_dim / 2]`` float32, radians per position.

    Raises :class:`UnsupportedModel` for ``dynamic`` where ``max_len`` reaches beyond the trained length: there the
    angles of old positions would change as a sequence grows, and cached keys would be wrong.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse: Tensor = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    if rope.kind == "dynamic" and max_len > rope.original_len:
        raise UnsupportedModel(
            f"rope type 'dynamic' beyond {rope.original_len} positions is not supported",
            remedy=f"set model.max_model_len to at most {rope.original_len}",
        )
    return inverse


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
        angles = torch.outer(
            torch.arange(max_len, dtype=torch.float32), inverse_frequencies(rope, head_dim, max_len)
        )
        cos, sin = angles.cos(), angles.sin()
        self._half = head_dim // 2
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)
        # The first half is subtracted in the rotation: its sign lives here, so that a roll does the rest.
        self._sin = torch.cat((-sin, sin), -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines ``[tokens, 1, head_dim]`` for ``positions`` ``[tokens]``."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """``x`` ``[tokens, heads, head_dim]`` turned by ``angles`` of :meth:`at`."""
        cos, sin = angles
        return torch.addcmul(x * cos, x.roll(self._half, -1), sin)
