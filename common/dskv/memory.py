"""KV in mapped memory: the pools of an instance's ranks, or canonical blocks in a buffer, and copies between them.

A canonical block is one of the whole model in its owner's layout: that is what a checksum is over and what streams
carry, however many ranks the owner and the reader have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from dskv.checksum import block_sum, checksum
from dskv.layout import KvLayout
from dskv.reshard import Placement, canonical, plan, runs
from dskv.segment import Segment, SegmentCache
from dskv.shards import KvShard

#: read of each rank's pool to prove that it can be
PROOF_NBYTES = 4 << 20


class KvMemory(Protocol):
    """Blocks that can be read and written, rank by rank."""

    @property
    def placement(self) -> Placement:
        """What each rank's blocks hold."""

    def block(self, rank: int, number: int) -> memoryview:
        """The bytes of one rank's block."""


class RankPools:
    """The pools of an instance's ranks, as one."""

    def __init__(self, placement: Placement, segments: Sequence[Segment]) -> None:
        self.placement = placement
        self._segments = tuple(segments)
        only = placement.shards == (whole_model(placement.layout, placement.shards[0].segment),)
        #: the one pool that holds everything, where there is only one rank
        self.single = self._segments[0] if only else None

    @classmethod
    def of(cls, layout: KvLayout, segment: Segment) -> RankPools:
        """An instance of one rank."""
        return cls(Placement(layout, (whole_model(layout, str(segment.path)),)), [segment])

    @classmethod
    def map(
        cls,
        layout: KvLayout,
        shards: tuple[KvShard, ...],
        blocks: int,
        cache: SegmentCache,
        *,
        writable: bool = False,
    ) -> RankPools:
        """Map the files of all ranks. Raises :class:`TransferFailed` when one cannot be."""
        sizes = [shard.layout(layout).block_nbytes for shard in shards]
        segments = [
            cache.get(shard.segment, blocks, size, writable=writable)
            for shard, size in zip(shards, sizes, strict=True)
        ]
        return cls(Placement(layout, shards), segments)

    def block(self, rank: int, number: int) -> memoryview:
        """The bytes of one rank's block."""
        return self._segments[rank].slot(number)

    def clear(self, numbers: Sequence[int]) -> None:
        """Zero whole blocks."""
        for segment in self._segments:
            zeros = bytes(segment.slot_nbytes)
            for number in numbers:
                segment.slot(number)[:] = zeros

    def reserve(self, numbers: Sequence[int]) -> None:
        """Have the pages of blocks. Raises as :meth:`Segment.reserve`."""
        for segment in self._segments:
            segment.reserve(numbers)

    def discard(self, numbers: Sequence[int]) -> None:
        """Give the pages of blocks back."""
        for segment in self._segments:
            segment.discard(numbers)

    def checksum(self, numbers: Sequence[int]) -> int:
        """Over canonical blocks in order."""
        return checksum(b"".join(map(block_sum, self.canonical(numbers))))

    def canonical(self, numbers: Sequence[int]) -> Iterator[memoryview]:
        """Canonical blocks, one by one; those of several ranks share one buffer, and are good until the next."""
        if self.single is not None:
            yield from map(self.single.slot, numbers)
            return
        together = CanonicalBlocks.scratch(self.placement.layout)
        for number in numbers:
            copy(self, [number], together, [0], 0, self.placement.layout.block_size)
            yield together.data


class CanonicalBlocks:
    """Whole blocks of the whole model, one behind the other."""

    def __init__(self, layout: KvLayout, data: memoryview) -> None:
        self.placement = canonical(layout)
        self.data = data
        self._nbytes = layout.block_nbytes

    @classmethod
    def scratch(cls, layout: KvLayout) -> CanonicalBlocks:
        """Room for one block, zeroed."""
        return cls(layout, memoryview(bytearray(layout.block_nbytes)))

    def block(self, rank: int, number: int) -> memoryview:
        """The bytes of block ``number`` of the buffer."""
        return self.data[number * self._nbytes : (number + 1) * self._nbytes]

    def clear(self) -> None:
        """Zero all."""
        self.data[:] = bytes(len(self.data))


def copy(
    source: KvMemory,
    source_blocks: Sequence[int],
    target: KvMemory,
    target_blocks: Sequence[int],
    first: int,
    end: int,
) -> None:
    """Copy the tokens ``first`` to ``end`` of the sequence whose blocks these are."""
    for box in plan(source.placement, target.placement, first, end):
        theirs = source.block(box.source, source_blocks[box.source_block])
        mine = target.block(box.target, target_blocks[box.target_block])
        for run in runs(box, source.placement, target.placement):
            mine[run.target : run.target + run.nbytes] = theirs[run.source : run.source + run.nbytes]


def read_rate(layout: KvLayout, shards: tuple[KvShard, ...], blocks: int) -> float:
    """Map an owner's pools, read some blocks of each and tell the bytes per second.

    Raises :class:`TransferFailed` where they cannot be mapped.
    """
    cache = SegmentCache()
    try:
        pools = RankPools.map(layout, shards, blocks, cache)
        total, began = 0, time.perf_counter()
        for rank in range(len(shards)):
            for number in range(blocks):
                if total >= (rank + 1) * PROOF_NBYTES:
                    break
                total += len(bytes(pools.block(rank, number)))
        return total / max(time.perf_counter() - began, 1e-9)
    finally:
        cache.close()


def whole_model(layout: KvLayout, segment: str) -> KvShard:
    """The shard of an instance of one rank."""
    return KvShard(segment, 0, layout.layers, 0, layout.kv_heads)
