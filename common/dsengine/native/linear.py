"""Single matrices in int8 on the compiled kernels, for models whose decoder is torch's: mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.int8 import GROUP, Int8Linear, before, quantise
from dsengine.linear import AnyLinear, Cut
from dsengine.native.arena import Arena
from dsengine.native.library import Library, Team, int8_nbytes, padded
from dsengine.native.structs import CLinear


class Int8Linears:
    """Makes them; they share threads, so that one product is made at a time."""

    def __init__(self, kernels: Library, threads: int) -> None:
        """Raises :class:`~dswire.errors.OutOfMemory`."""
        self._kernels = kernels
        self._team = kernels.team(threads)
        self._arena = Arena()

    def __call__(self, weight: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> AnyLinear:
        """``weight`` ``[out, in]`` on the CPU, ``bias`` ``[out]``. Columns that do not pair up are torch's."""
        rows, columns = weight.shape
        first_group = GROUP - before(cut)
        if columns % 2 or first_group % 2:
            return Int8Linear(weight, bias, cut)
        q, scale = quantise(weight, cut)
        panels = self._arena.take(int8_nbytes(q, scale), torch.uint8)
        self._kernels.pack_int8(q, scale, first_group, panels)
        wide = torch.zeros(padded(rows))
        if bias is not None:
            wide[:rows] = bias
        matrix = CLinear(panels.data_ptr(), wide.data_ptr(), columns, rows, first_group)
        return NativeInt8Linear(self._team, matrix, (panels, wide))


class NativeInt8Linear:
    """``y = x Wᵀ + b`` with ``W`` in int8. A row's result does not depend on the others."""

    def __init__(self, team: Team, matrix: CLinear, kept: tuple[Tensor, ...]) -> None:
        """``kept`` is what ``matrix`` points to."""
        self._team = team
        self._matrix = matrix
        self._kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        y = torch.empty(len(x), padded(self._matrix.out))
        self._team.multiply(self._matrix, x, y)
        return y[:, : self._matrix.out].to(x.dtype)
