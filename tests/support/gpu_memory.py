"""GPU memory that is none: what CUDA IPC does between processes is done within this one, for pools of CPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsengine.gpu_copies import GpuCopies
from dskv.layout import KvLayout
from dskv.segment import Segment
from dskv.shards import GpuMemory
from dswire.errors import TransferFailed


@dataclass(slots=True)
class SharedMemory:
    """Who shares what; a pool whose owner is gone cannot be opened."""

    shared: dict[bytes, Tensor] = field(default_factory=dict)
    #: how often one was opened
    openings: int = 0

    def share(self, blocks: Tensor) -> GpuMemory:
        """As :func:`dsengine.ipc.share`."""
        handle = len(self.shared).to_bytes(8, "little")
        self.shared[handle] = blocks
        return GpuMemory("GPU-0", handle, blocks.nbytes, 0, b"", 0, b"", False)

    def opened(self, memory: GpuMemory, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As :func:`dsengine.ipc.opened`."""
        self.openings += 1
        if memory.handle not in self.shared:
            raise TransferFailed("its owner is gone")
        blocks = self.shared[memory.handle]
        assert (tuple(blocks.shape), blocks.dtype) == (shape, dtype)
        return blocks

    def copies(self, layout: KvLayout, pool: Segment) -> GpuCopies:
        """Of an instance with this pool."""
        blocks = torch.frombuffer(pool.buffer, dtype=torch.float16).view(pool.slots, -1)
        return GpuCopies(blocks, layout, self.share, self.opened)
