"""The paged KV cache of an instance: a pool of blocks in one contiguous buffer.

Layout: ``[num_blocks, layers, 2 (K, V), kv_heads, block_size, head_dim]`` (:mod:`dskv.layout`). On the CPU the
buffer can be a mapped file, so that other processes of the host copy blocks straight out of it; beside a buffer
that they cannot map there can be a mirror, which is one.

Invariant: the bytes of a block behind its sequence's last token are zero. Blocks are cleared before their
first token is written (:meth:`KvPool.clear`), so nothing of an earlier request, and no NaN of one, is read,
checksummed or handed on.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch
from torch import Tensor

from dsengine.mirror import Mirror
from dskv.layout import KvLayout
from dskv.segment import Segment
from dswire.errors import OutOfMemory

#: torch dtypes by their names in a topology
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """``num_blocks`` blocks of ``layout``; who owns which block is not known here."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: torch.device,
        segment: Path | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        """Allocate, in the file ``segment`` where given, or with a mirror there. Raises :class:`OutOfMemory`."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        #: what others map: the pool or its mirror
        self.segment: Segment | None = None
        self.mirror: Mirror | None = None
        if segment is not None and not mirrored:
            self.segment = Segment.create(segment, num_blocks, layout.block_nbytes)
            self.segment.warm()
            flat = torch.frombuffer(self.segment.buffer, dtype=DTYPES[layout.dtype])
        else:
            flat = _allocate(num_blocks * layout.block_nbytes, DTYPES[layout.dtype], device)
        self._blocks: Tensor = flat.view(num_blocks, -1)
        if segment is not None and mirrored:
            self.segment = Segment.create(segment, num_blocks, layout.block_nbytes, sparse=True)
            self.mirror = Mirror(self._blocks, self.segment)
        # One view a layer, each beginning at that layer of block 0: the index tensors of a step then serve all
        # layers unchanged.
        heads = flat.view(-1, layout.block_size * layout.head_dim)
        rows = flat.view(-1, layout.head_dim)
        step = 2 * layout.kv_heads
        self._heads = [heads[layer * step :] for layer in range(layout.layers)]
        self._rows = [rows[layer * step * layout.block_size :] for layer in range(layout.layers)]

    @property
    def blocks(self) -> Tensor:
        """All of it, ``[num_blocks, elements of a block]``."""
        return self._blocks

    def layer(self, layer: int) -> Tensor:
        """What begins at that layer of block 0, ``[.., head_dim]``; that of block 1 is a block's length behind."""
        return self._rows[layer]

    @property
    def base(self) -> int:
        """The address of block 0."""
        return self._blocks.data_ptr()

    def clear(self, blocks: Tensor) -> None:
        """Zero ``blocks`` ``[n]``."""
        self._blocks.index_fill_(0, blocks, 0)

    def write_index(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Where tokens go: block ``[tokens]`` and offset in it ``[tokens]`` -> index for :meth:`write`."""
        return self._head_index(blocks) * self.layout.block_size + offsets[:, None]

    def write(self, layer: int, index: Tensor, kv: Tensor) -> None:
        """Store ``kv`` ``[tokens, 2 * kv_heads, head_dim]``, K heads before V heads."""
        self._rows[layer].index_copy_(0, index.view(-1), kv.reshape(-1, self.layout.head_dim))

    def read_index(self, table: Tensor) -> Tensor:
        """Block table ``[batch, blocks]`` -> index ``[2, batch, kv_heads, blocks]`` for :meth:`read`."""
        batch, blocks = table.shape
        index = self._head_index(table.reshape(-1)).view(batch, blocks, 2, self.layout.kv_heads)
        return index.permute(2, 0, 3, 1).contiguous()

    def read(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V, each ``[batch, kv_heads, blocks * block_size, head_dim]``."""
        _, batch, kv_heads, blocks = index.shape
        gathered = self._heads[layer].index_select(0, index.view(-1))
        both = gathered.view(2, batch, kv_heads, blocks * self.layout.block_size, self.layout.head_dim)
        return both[0], both[1]

    def close(self) -> None:
        """Give the memory back; the pool is of no use afterwards. Doing it twice is harmless."""
        self._blocks = torch.empty(0)
        self._heads, self._rows = [], []
        if self.mirror is not None:
            self.mirror.close()
        if self.segment is not None:
            self.segment.close()

    def _head_index(self, blocks: Tensor) -> Tensor:
        """``[n] -> [n, 2 * kv_heads]``: runs of ``block_size * head_dim`` elements, counted from a layer's view."""
        step = 2 * self.layout.kv_heads
        return (blocks * (self.layout.layers * step))[:, None] + torch.arange(step, device=blocks.device)


def _allocate(nbytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        if device.type == "cpu":
            return torch.frombuffer(_pages(nbytes), dtype=dtype)
        return torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError, OSError, OverflowError) as error:
        raise OutOfMemory(
            f"no room on {device} for a KV pool of {nbytes} bytes",
            remedy="lower kv.memory in the topology",
        ) from error


def _pages(nbytes: int) -> mmap.mmap:
    """Zeroed memory whose pages the system hands out when they are first used: loading does not wait for them.

    Huge ones where it gives them: blocks lie anywhere, and to find many small pages takes as long as to read them.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
