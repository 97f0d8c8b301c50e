"""The mirror of a KV pool that other processes cannot map: a mapped file of as many blocks.

Others read from it and write into it as if it were the pool; blocks are copied between the two when they are to be
handed over, or have come. Between a GPU and the file they go by way of page-locked memory for a few blocks: the
pages of the file come and go (:mod:`dskv.pages`).

Invariant: a copy begins when all steps that were launched before it are through with the pool, and is over when
the method returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor

from dsengine.side_stream import SideStream
from dskv.segment import Segment
from dswire.messages.ranks import MirrorWay

#: copied at once
_BOUNCE_NBYTES = 8 << 20


class Mirror:
    """``segment`` beside ``blocks`` ``[num_blocks, elements of a block]``. For use by any thread."""

    def __init__(self, blocks: Tensor, segment: Segment) -> None:
        self._blocks = blocks
        self._file = torch.frombuffer(segment.buffer, dtype=blocks.dtype).view(blocks.shape)
        rows = min(max(_BOUNCE_NBYTES // segment.slot_nbytes, 1), len(blocks))
        gpu = blocks.device.type == "cuda"
        self._bounce = torch.empty((rows, blocks.shape[1]), dtype=blocks.dtype, pin_memory=gpu)
        self._stream = SideStream(blocks.device)
        self._lock = Lock()

    def copy(self, blocks: Sequence[int], way: MirrorWay) -> None:
        """Copy ``blocks`` from the pool to the file, or from there to the pool."""
        if way == "out":
            self._out(blocks)
        else:
            self._in(blocks)

    def _out(self, blocks: Sequence[int]) -> None:
        for part in self._parts(blocks):
            with self._stream.behind_steps():
                for row, block in zip(self._bounce, part, strict=False):
                    row.copy_(self._blocks[block], non_blocking=True)
            for row, block in zip(self._bounce, part, strict=False):
                self._file[block].copy_(row)

    def _in(self, blocks: Sequence[int]) -> None:
        for part in self._parts(blocks):
            for row, block in zip(self._bounce, part, strict=False):
                row.copy_(self._file[block])
            with self._stream.behind_steps():
                for row, block in zip(self._bounce, part, strict=False):
                    self._blocks[block].copy_(row, non_blocking=True)

    def close(self) -> None:
        """Let go of all memory; the mirror is of no use afterwards."""
        with self._lock:
            self._blocks = self._file = self._bounce = torch.empty(0)

    def _parts(self, blocks: Sequence[int]) -> Iterator[Sequence[int]]:
        """As many as there is room for on the way; one copy at a time."""
        with self._lock:
            for at in range(0, len(blocks), len(self._bounce)):
                yield blocks[at : at + len(self._bounce)]
