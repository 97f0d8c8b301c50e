"""Memory for weights that are read from end to end in every step, in huge pages where the system gives them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

#: bytes of one chunk; what is not handed out is never touched, so it takes no memory
_CHUNK_NBYTES = 64 << 20
_HUGE_PAGE = 2 << 20
_LINE = 64
_MADV_HUGEPAGE = 14


class Arena:
    """Hands out pieces, never takes one back."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` uninitialised elements on a border of cache lines."""
        nbytes = count * dtype.itemsize
        whole = -(-nbytes // _LINE) * _LINE
        if whole > len(self._chunk):
            self._chunk = _chunk(max(whole, _CHUNK_NBYTES))
        piece, self._chunk = self._chunk[:nbytes], self._chunk[whole:]
        return piece.view(dtype)


def _chunk(nbytes: int) -> Tensor:
    memory = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    chunk = memory[start : start + nbytes]
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
        madvise(ctypes.c_void_p(chunk.data_ptr()), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return chunk
