"""What of CUDA IPC can be seen without a GPU: that torch's functions take what they are given."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.multiprocessing import reductions

from dsengine import ipc
from dskv.shards import GpuMemory
from dswire.errors import TransferFailed


def test_torch_tells_of_a_storage_what_is_told_on() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert [name for fields in ipc._FIELDS for name in names[fields]] == [
        "storage_handle",
        "storage_size_bytes",
        "storage_offset_bytes",
        "ref_counter_handle",
        "ref_counter_offset",
        "event_handle",
        "event_sync_required",
    ]
    assert len(GpuMemory.__struct_fields__) == 1 + 7
    assert names[:7] + names[10:11] == [
        "tensor_cls",
        "tensor_size",
        "tensor_stride",
        "tensor_offset",
        "storage_cls",
        "dtype",
        "storage_device",
        "requires_grad",
    ]


def test_a_gpu_that_this_process_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ipc, "uuid_of", lambda device: f"GPU-{device.index}")
    memory = GpuMemory("GPU-7", b"", 1, 0, b"", 0, b"", False)
    with pytest.raises(TransferFailed, match="GPU-7 is not among the 2"):
        ipc.opened(memory, (1, 1), torch.float16)


def test_a_pool_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid device context\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ipc, "uuid_of", lambda device: f"GPU-{device.index}")
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", refuse)
    memory = GpuMemory("GPU-0", b"", 1, 0, b"", 0, b"", False)
    with pytest.raises(TransferFailed, match=r"cannot be opened: CUDA error: invalid device context$"):
        ipc.opened(memory, (1, 1), torch.float16)
