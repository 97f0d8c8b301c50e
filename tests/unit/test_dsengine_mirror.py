"""A pool and the file that others see instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsengine import mirror
from dsengine.pool import KvPool
from dskv.layout import KvLayout
from dskv.segment import Segment

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=4, block_size=5, dtype="bfloat16")
BLOCKS = 9


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KvPool]:
    # two blocks at once
    monkeypatch.setattr(mirror, "_BOUNCE_NBYTES", 2 * LAYOUT.block_nbytes)
    made = KvPool(LAYOUT, BLOCKS, torch.device("cpu"), tmp_path / "pool", mirrored=True)
    for block in range(BLOCKS):
        made._blocks[block] = block + 1
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def content(pool: KvPool, tmp_path: Path) -> tuple[list[float], list[float]]:
    """What is in each block of the pool, and in each that another process sees."""
    other = Segment.open(tmp_path / "pool", BLOCKS, LAYOUT.block_nbytes)
    seen = [torch.frombuffer(bytearray(other.slot(block)), dtype=torch.bfloat16) for block in range(BLOCKS)]
    other.close()
    for block in (*pool._blocks, *seen):
        assert len(set(block.tolist())) == 1
    return [float(block[0]) for block in pool._blocks], [float(block[0]) for block in seen]


def test_others_see_what_was_copied_out_and_no_more(pool: KvPool, tmp_path: Path) -> None:
    assert pool.mirror is not None
    pool.mirror.copy((7, 0, 3, 8, 2), "out")
    assert content(pool, tmp_path) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 0, 3, 4, 0, 0, 0, 8, 9])


def test_the_pool_gets_what_was_copied_in_and_no_more(pool: KvPool, tmp_path: Path) -> None:
    assert pool.mirror is not None
    assert pool.segment is not None
    numbers = 20 + torch.arange(BLOCKS).bfloat16().repeat_interleave(LAYOUT.block_nbytes // 2)
    pool.segment.buffer[:] = numbers.view(torch.uint8).numpy().tobytes()
    pool.mirror.copy((4, 6, 1), "in")
    assert content(pool, tmp_path) == ([1, 21, 3, 4, 24, 6, 26, 8, 9], [20.0 + block for block in range(BLOCKS)])
