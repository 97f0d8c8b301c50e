"""KV from the pool of one GPU into that of another, or of the same one, without the host's memory.

The checksum is made where the KV lies: of a block's words by the product of their halves, as XXH3 does it, and of
the sums of all blocks by xxh3_64. It is not that of ``dskv.checksum``, which is over KV in the host's memory; so it
is only compared with one that another GPU has made. It is over what lies in the own blocks.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

import torch
import xxhash
from torch import Tensor

from dsengine.ipc import opened, share
from dsengine.side_stream import SideStream
from dskv.handle import KvHandle
from dskv.layout import KvLayout
from dskv.memory import PROOF_NBYTES
from dskv.receive import compare
from dskv.shards import GpuMemory, KvShard
from dswire.errors import KvCorrupt, TransferFailed
from dswire.messages.kv import PoolInfo

#: copied or summed at once: what that takes beside the pools is a few times as much
_PART_NBYTES = 16 << 20
#: of the 64-bit words of a block; odd, so that no change of one word is lost
_FACTOR = -7046029254386353131
_LOW = (1 << 32) - 1


class GpuCopies:
    """Into a pool: ``blocks`` ``[num_blocks, elements of a block]``, eight bytes times n each. For any thread."""

    def __init__(
        self,
        blocks: Tensor,
        layout: KvLayout,
        share_memory: Callable[[Tensor], GpuMemory] = share,
        open_memory: Callable[[GpuMemory, tuple[int, ...], torch.dtype], Tensor] = opened,
    ) -> None:
        """``share_memory`` and ``open_memory``: as those of ``dsengine.ipc``."""
        self._blocks = blocks
        self._layout = layout
        self._open_memory = open_memory
        #: what others open
        self.shared = share_memory(blocks)
        #: pools of owners, by their names
        self._opened: dict[str, tuple[GpuMemory, Tensor]] = {}
        words = layout.block_nbytes // 8
        self._keys = (torch.arange(words, device=blocks.device) * 2 + 1) * _FACTOR
        self._stream = SideStream(blocks.device)
        self._lock = Lock()

    def seal(self, blocks: Sequence[int], *, summed: bool) -> int:
        """Wait for the steps that were launched before to leave ``blocks``; their checksum if it is wanted."""
        with self._lock, self._stream.behind_steps():
            return self._checksum(blocks) if summed else 0

    def fetch(self, handle: KvHandle, blocks: Sequence[int], *, summed: bool) -> None:
        """Copy the KV of ``handle`` into ``blocks``, and verify it where it is ``summed``.

        Raises :class:`KvCorrupt` and :class:`TransferFailed`.
        """
        if handle.layout != self._layout:
            raise KvCorrupt(f"{handle.key}: its blocks lie otherwise than those of the pool")
        if len(blocks) < len(handle.blocks):
            raise KvCorrupt(f"{handle.key}: takes {len(handle.blocks)} blocks, {len(blocks)} were reserved")
        mine = blocks[: len(handle.blocks)]
        if max(handle.blocks) >= handle.segment_blocks:
            raise TransferFailed(f"{handle.key}: {handle.owner} has no block {max(handle.blocks)}")
        with self._lock, self._stream.behind_steps():
            theirs = self._opened_of(handle.owner, handle.shards, handle.segment_blocks)
            for at in self._parts(len(mine)):
                came = theirs[_index(handle.blocks[at], theirs)].to(self._blocks.device)
                self._blocks[_index(mine[at], self._blocks)] = came
            if summed:
                compare(handle, self._checksum(mine))

    def close(self) -> None:
        """Close the pools of others."""
        self._opened.clear()

    def read_rate(self, owner: str, pool: PoolInfo) -> float:
        """Open a pool, read some blocks of it and tell the bytes per second. Raises :class:`TransferFailed`."""
        if pool.layout != self._layout:
            raise TransferFailed(f"the blocks of {owner} lie otherwise than those of this pool")
        with self._lock, self._stream.behind_steps():
            theirs = self._opened_of(owner, pool.shards, pool.blocks)
            some = range(min(pool.blocks, max(1, PROOF_NBYTES // pool.layout.block_nbytes)))
            began = time.perf_counter()
            # what comes back to the host has been read
            came = theirs[_index(some, theirs)].to(self._blocks.device).view(torch.int64).sum().item()
        assert isinstance(came, int)
        return len(some) * pool.layout.block_nbytes / max(time.perf_counter() - began, 1e-9)

    def _opened_of(self, owner: str, shards: Sequence[KvShard], blocks: int) -> Tensor:
        """Its pool, opened once in its life."""
        memory = shards[0].gpu
        if memory is None:
            raise TransferFailed(
                f"{owner} does not share its GPU's memory", remedy="start all instances with the same topology"
            )
        known = self._opened.get(owner)
        if known is None or known[0] != memory:
            self._opened.pop(owner, None)
            shape = (blocks, self._blocks.shape[1])
            known = self._opened[owner] = memory, self._open_memory(memory, shape, self._blocks.dtype)
        return known[1]

    def _checksum(self, blocks: Sequence[int]) -> int:
        sums = xxhash.xxh3_64()
        for at in self._parts(len(blocks)):
            words = self._blocks[_index(blocks[at], self._blocks)].view(torch.int64)
            keyed = words ^ self._keys
            # wrapping around is meant
            mixed = (keyed & _LOW) * ((keyed >> 32) & _LOW) + words * self._keys
            rows = mixed.sum(1).tolist()
            sums.update(struct.pack(f"<{len(rows)}q", *rows))
        return sums.intdigest()

    def _parts(self, count: int) -> Iterator[slice]:
        each = max(1, _PART_NBYTES // self._layout.block_nbytes)
        return (slice(at, at + each) for at in range(0, count, each))


def _index(blocks: Sequence[int], of: Tensor) -> Tensor:
    return torch.tensor(blocks, device=of.device)
