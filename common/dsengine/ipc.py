"""The pool of a GPU, opened by other processes of the host: CUDA IPC, as torch.multiprocessing does it.

What is told of a pool is good while its owner lives. An owner that began anew tells something else; what was opened
of the old one is closed with the last tensor that looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from dskv.shards import GpuMemory
from dswire.errors import TransferFailed

#: of what :func:`torch.multiprocessing.reductions.reduce_tensor` gives to build a tensor of
_FIELDS = slice(7, 10), slice(11, 15)


def share(blocks: Tensor) -> GpuMemory:
    """What others need to open ``blocks``, contiguous and at the beginning of their storage."""
    reduce: Any = reductions.reduce_tensor
    _, told = reduce(blocks)
    return GpuMemory(uuid_of(blocks.device), *told[_FIELDS[0]], *told[_FIELDS[1]])


def opened(memory: GpuMemory, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Another process's blocks, on their GPU, which need not be ours. Raises :class:`TransferFailed`."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    device = next((one for one in devices if uuid_of(one) == memory.uuid), None)
    if device is None:
        raise TransferFailed(
            f"GPU {memory.uuid} is not among the {len(devices)} that this process sees",
            remedy="have all instances of the node see the same GPUs, or say `force_transport: shm`",
        )
    stride = (shape[1], 1)
    rebuild: Any = reductions.rebuild_cuda_tensor
    try:
        tensor: Tensor = rebuild(
            Tensor,
            torch.Size(shape),
            stride,
            0,
            torch.UntypedStorage,
            dtype,
            device.index,
            memory.handle,
            memory.nbytes,
            memory.offset,
            False,
            memory.counter,
            memory.counter_offset,
            memory.event,
            memory.event_needed,
        )
    except RuntimeError as error:
        raise TransferFailed(
            f"the pool on GPU {memory.uuid} cannot be opened: {str(error).partition(chr(10))[0]}",
            remedy="see that both processes run in one IPC namespace, or say `force_transport: shm`",
        ) from error
    return tensor


def uuid_of(device: torch.device) -> str:
    """Of a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


def unreachable(devices: Sequence[str]) -> str | None:
    """Which of these GPUs cannot read another one's memory; None where all can."""
    indices = sorted({torch.device(name).index or 0 for name in devices})
    for one in indices:
        for other in indices:
            if one != other and not torch.cuda.can_device_access_peer(one, other):
                return f"cuda:{one} cannot read the memory of cuda:{other}"
    return None
