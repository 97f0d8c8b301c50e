"""The decode side of a hand-off: bytes into the own pool's blocks, and the proof that they are the right ones.

Invariant: the checksum is computed over what lies in the own blocks, in token order, each block exactly once;
so :meth:`Receiver.verify` vouches for the memory that the model will read, not for what was on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from dskv.handle import KvHandle
from dskv.segment import Segment
from dswire.errors import KvCorrupt, TransferFailed
from dswire.messages.kv import Chunk


class Receiver:
    """Receives the KV of one handle. Its methods block for the time of a copy: call them in a worker thread."""

    def __init__(self, handle: KvHandle, pool: Segment, own_blocks: Sequence[int]) -> None:
        """``own_blocks``: blocks of ``pool``; the first ones, as many as the handle has, are written.

        Raises :class:`KvCorrupt` when they are too few, or blocks of another size.
        """
        if handle.layout.block_nbytes != pool.slot_nbytes:
            raise KvCorrupt(
                f"{handle.key}: blocks of {handle.layout.block_nbytes} bytes do not fit a pool whose blocks have "
                f"{pool.slot_nbytes} bytes"
            )
        if len(own_blocks) < len(handle.blocks):
            raise KvCorrupt(f"{handle.key}: has {len(handle.blocks)} blocks, {len(own_blocks)} were reserved")
        self.handle = handle
        #: blocks that have arrived
        self.taken = 0
        self._pool = pool
        self._own = tuple(own_blocks[: len(handle.blocks)])
        self._digest = xxhash.xxh3_64()
        self._next = 0

    @property
    def complete(self) -> bool:
        """Whether every block has arrived."""
        return self.taken == len(self._own)

    def copy_direct(self, source: Segment) -> None:
        """Copy everything straight from the owner's mapped pool. Raises :class:`TransferFailed`."""
        if self.taken:
            raise TransferFailed(f"{self.handle.key}: a part of it has come by another way already")
        for theirs, mine in zip(self.handle.blocks, self._own, strict=True):
            self._pool.copy_from(source, [(theirs, mine)])
            # a block is summed while the processor's caches still hold it: memory is read once, not twice
            self._digest.update(self._pool.slot(mine))
        self.taken = len(self._own)

    def take(self, chunk: Chunk, data: memoryview) -> None:
        """Copy the next chunk out of ``data``, which may be longer. Raises :class:`TransferFailed` out of order."""
        if (chunk.index, chunk.first) != (self._next, self.taken) or chunk.count < 1:
            raise TransferFailed(
                f"{self.handle.key}: chunk {chunk.index} at block {chunk.first} came where chunk {self._next} at "
                f"block {self.taken} is due"
            )
        size = self._pool.slot_nbytes
        blocks = self._own[chunk.first : chunk.first + chunk.count]
        if len(blocks) != chunk.count or len(data) < chunk.count * size:
            raise TransferFailed(f"{self.handle.key}: chunk {chunk.index} has not the size that it tells")
        for place, block in enumerate(blocks):
            target = self._pool.slot(block)
            target[:] = data[place * size : (place + 1) * size]
            self._digest.update(target)
        self.taken += chunk.count
        self._next += 1

    def verify(self) -> None:
        """Vouch for the blocks. Raises :class:`TransferFailed` when some are missing, else :class:`KvCorrupt`."""
        if not self.complete:
            raise TransferFailed(f"{self.handle.key}: {self.taken} of {len(self._own)} blocks have come")
        found = self._digest.intdigest()
        if found != self.handle.checksum:
            raise KvCorrupt(
                f"{self.handle.key}: the KV from {self.handle.owner} has checksum {found:016x}, "
                f"{self.handle.checksum:016x} was announced"
            )
