"""Copies of blocks between mapped segments, summed on their way.

Compiled where the host has a C++ compiler: one pass reads each word once, sums it and writes it past the caches,
which takes less time than ``memcpy`` alone. Elsewhere each block is copied, and summed while the caches hold it.
What is summed is what is written, in either way.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Protocol

from dshost.library import build, load, native_flags
from dskv.checksum import block_sum
from dswire.errors import Failed

_log = logging.getLogger(__name__)
#: copied in less time than it takes to have a thread do it; more is written past the caches
SMALL_NBYTES = 512 << 10
#: the compiled sum is that of longer blocks
_SHORT_NBYTES = 240


class Copier(Protocol):
    """Copies ``nbytes`` from each of ``theirs``, numbers of blocks at the address ``source``, to ``mine``."""

    def __call__(
        self, target: int, source: int, nbytes: int, mine: Sequence[int], theirs: Sequence[int], *, summed: bool
    ) -> bytes:
        """The sums of the blocks (:func:`dskv.checksum.block_sum`) in order, or nothing unless ``summed``."""
        ...


@cache
def copier() -> Copier:
    """This host's. The first call may compile for a second or two: have it in a thread, before there is a hurry."""
    try:
        compiled = load(build("copying", Path(__file__).with_name("copying.cpp"), native_flags())).ds_copy
    except Failed as error:
        _log.warning("KV is copied without compiled help: %s; %s", error, error.remedy)
        return plain
    address, numbers = c_void_p, c_int64
    compiled.argtypes = (address, address, numbers, numbers, c_void_p, c_void_p, c_void_p, c_int32)
    compiled.restype = None

    def fused(
        target: int, source: int, nbytes: int, mine: Sequence[int], theirs: Sequence[int], *, summed: bool
    ) -> bytes:
        if nbytes <= _SHORT_NBYTES:
            return plain(target, source, nbytes, mine, theirs, summed=summed)
        count = len(mine)
        places = c_int64 * count
        sums = (c_uint64 * count)() if summed else None
        past = count * nbytes > SMALL_NBYTES
        compiled(target, source, nbytes, count, places(*mine), places(*theirs), sums, past)
        return b"" if sums is None else bytes(sums)

    return fused


def plain(
    target: int, source: int, nbytes: int, mine: Sequence[int], theirs: Sequence[int], *, summed: bool
) -> bytes:
    """A :class:`Copier` for any host."""
    sums = bytearray()
    for to, block in zip(mine, theirs, strict=True):
        ctypes.memmove(target + to * nbytes, source + block * nbytes, nbytes)
        if summed:
            # while the processor's caches still hold it: memory is read once, not twice
            sums += block_sum(memoryview((ctypes.c_char * nbytes).from_address(target + to * nbytes)))
    return bytes(sums)
