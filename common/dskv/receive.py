"""The decode side of a hand-off: bytes into the own pool's blocks, and the proof that they are the right ones.

Invariant: the checksum is computed over what is written to the own blocks, in token order, each token exactly once;
so :meth:`Receiver.verify` vouches for the memory that the model will read, not for what was on the way. Where the
owner shares the model out otherwise, or has blocks of another size, the KV is put together again from the own
blocks as it lies in the owner's, whose bytes behind the last token are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dskv.checksum import SUM_NBYTES, block_sum, checksum
from dskv.handle import KvHandle
from dskv.memory import CanonicalBlocks, KvMemory, RankPools, copy
from dskv.reshard import difference
from dswire.errors import KvCorrupt, TransferFailed


def compare(handle: KvHandle, found: int) -> None:
    """Raises :class:`KvCorrupt` where ``found`` is not the checksum that was announced."""
    if found != handle.checksum:
        raise KvCorrupt(
            f"{handle.key}: the KV from {handle.owner} has checksum {found:016x}, "
            f"{handle.checksum:016x} was announced"
        )


class Receiver:
    """Receives the KV of one handle. Its methods block for the time of a copy: call them in a worker thread."""

    def __init__(
        self, handle: KvHandle, pool: RankPools, own_blocks: Sequence[int], *, summed: bool = True
    ) -> None:
        """``own_blocks``: blocks of ``pool``; the first ones, as many as the tokens take, are written.

        ``summed``: the handle has a checksum, to be compared.

        Raises :class:`KvCorrupt` when they are too few, or the KV is not one that the pool can hold.
        """
        own = pool.placement.layout
        error = difference(handle.layout, own)
        if error is not None:
            raise KvCorrupt(f"{handle.key}: does not fit the pool: {error.message}")
        needed = own.blocks_for(handle.tokens)
        if len(own_blocks) < needed:
            raise KvCorrupt(f"{handle.key}: takes {needed} blocks, {len(own_blocks)} were reserved")
        self.handle = handle
        #: blocks of the owner that have arrived
        self.taken = 0
        self._pool = pool
        self._own = tuple(own_blocks[:needed])
        #: the pool, where the owner's blocks can be had as they are
        self._alike = pool.single if handle.layout == own else None
        self._summed = summed
        #: of the owner's blocks, as they lie here
        self._sums = bytearray(SUM_NBYTES * len(handle.blocks))

    @property
    def complete(self) -> bool:
        """Whether every block has arrived."""
        return self.taken == len(self.handle.blocks)

    def copy_direct(self, source: RankPools) -> None:
        """Copy everything straight from the owner's mapped pools. Raises :class:`TransferFailed`."""
        if self.taken:
            raise TransferFailed(f"{self.handle.key}: a part of it has come by another way already")
        if self._alike is None or source.single is None:
            self._copy(source, self.handle.blocks, 0, len(self.handle.blocks))
            return
        sums = self._alike.copy_from(source.single, self.handle.blocks, self._own, summed=self._summed)
        self._sums[: len(sums)] = sums
        self.taken = len(self._own)

    def receive(self, read: Callable[[memoryview], None]) -> None:
        """Have ``read`` fill one canonical block after the other. Raises what it raises."""
        if self._alike is not None:
            for place, mine in enumerate(self._own):
                target = self._alike.slot(mine)
                read(target)
                self._sum(place, target)
                self.taken += 1
            return
        block = CanonicalBlocks.scratch(self.handle.layout)
        for at in range(len(self.handle.blocks)):
            read(block.data)
            # the block is number 0 of its buffer
            self._copy(block, range(-at, 1), at, 1)

    def verify(self) -> None:
        """Vouch for the blocks. Raises :class:`TransferFailed` when some are missing, else :class:`KvCorrupt`."""
        found = self.checksum()
        if self._summed:
            compare(self.handle, found)

    def checksum(self) -> int:
        """Of what lies in the own blocks, if it is summed. Raises :class:`TransferFailed` when some are missing."""
        if not self.complete:
            raise TransferFailed(f"{self.handle.key}: {self.taken} of {len(self.handle.blocks)} blocks have come")
        return checksum(self._sums)

    def _copy(self, source: KvMemory, numbers: Sequence[int], first: int, count: int) -> None:
        """Copy ``count`` of the owner's blocks, and sum what lies in the own ones."""
        if not self.taken:
            self._pool.clear(self._own)
        size, scratch = self.handle.layout.block_size, CanonicalBlocks.scratch(self.handle.layout)
        for at in range(first, first + count):
            low, high = at * size, min((at + 1) * size, self.handle.tokens)
            copy(source, numbers, self._pool, self._own, low, high)
            if self._summed:
                scratch.clear()
                copy(self._pool, self._own, scratch, range(-at, 1), low, high)
                self._sum(at, scratch.data)
        self.taken += count

    def _sum(self, place: int, data: memoryview) -> None:
        if self._summed:
            self._sums[place * SUM_NBYTES : (place + 1) * SUM_NBYTES] = block_sum(data)
