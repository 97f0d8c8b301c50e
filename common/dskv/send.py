"""The owner's side of a staged hand-off: which blocks go in which chunk, and their copy into a slot.

What lies in a slot are canonical blocks, put together from the pools of the owner's ranks.

Invariant: the chunks of a plan are whole blocks, in order, each block in exactly one chunk.
"""

from __future__ import annotations

from dskv.handle import KvHandle
from dskv.memory import CanonicalBlocks, RankPools, copy
from dswire.errors import TransferFailed
from dswire.messages.kv import Chunk


def plan(blocks: int, block_nbytes: int, slot_nbytes: int) -> tuple[Chunk, ...]:
    """Chunks of as many whole blocks as a slot holds. Raises :class:`TransferFailed` when not one fits."""
    each = slot_nbytes // block_nbytes
    if each < 1:
        raise TransferFailed(
            f"a KV block of {block_nbytes} bytes does not fit a staging slot of {slot_nbytes} bytes",
            remedy="raise relay.slot in the topology, or lower kv.block_size",
        )
    starts = range(0, blocks, each)
    return tuple(Chunk(index, first, min(each, blocks - first)) for index, first in enumerate(starts))


def stage(pool: RankPools, handle: KvHandle, chunk: Chunk, slot: memoryview) -> int:
    """Copy a chunk's blocks out of the owner's pool into ``slot``; returns the bytes written.

    Raises :class:`TransferFailed` for a chunk that the handle does not have or the slot cannot hold.
    """
    size = handle.layout.block_nbytes
    blocks = handle.blocks[chunk.first : chunk.first + chunk.count]
    nbytes = len(blocks) * size
    if not 0 < chunk.count == len(blocks) or chunk.first < 0:
        raise TransferFailed(f"{handle.key}: there is no chunk of {chunk.count} blocks at block {chunk.first}")
    if nbytes > len(slot):
        raise TransferFailed(f"{handle.key}: {nbytes} bytes do not fit a staging slot of {len(slot)} bytes")
    if pool.single is None:
        tokens = chunk.count * handle.layout.block_size
        copy(pool, blocks, CanonicalBlocks(handle.layout, slot), range(chunk.count), 0, tokens)
        return nbytes
    for place, block in enumerate(blocks):
        slot[place * size : (place + 1) * size] = pool.single.slot(block)
    return nbytes
