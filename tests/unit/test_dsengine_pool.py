"""The pool's bytes lie as the layout says, and go where they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsengine.pool import KvPool
from dskv.layout import KvLayout
from dskv.segment import Segment
from dswire.errors import OutOfMemory

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=4, block_size=5, dtype="float32")
CPU = torch.device("cpu")


def as_written(pool: KvPool) -> torch.Tensor:
    """The pool by its documented shape."""
    shape = (pool.num_blocks, LAYOUT.layers, 2, LAYOUT.kv_heads, LAYOUT.block_size, LAYOUT.head_dim)
    return pool._blocks.view(shape)


def random_kv(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 2 * LAYOUT.kv_heads, LAYOUT.head_dim)


@pytest.fixture
def pool() -> KvPool:
    return KvPool(LAYOUT, 7, CPU)


def test_writes_land_in_their_block_layer_and_slot_only(pool: KvPool) -> None:
    kv = random_kv(2)
    pool.write(1, pool.write_index(torch.tensor([6, 2]), torch.tensor([0, 4])), kv)
    expected = torch.zeros_like(as_written(pool))
    for token, (block, offset) in enumerate([(6, 0), (2, 4)]):
        expected[block, 1, :, :, offset] = kv[token].view(2, LAYOUT.kv_heads, LAYOUT.head_dim)
    assert torch.equal(as_written(pool), expected)


@pytest.mark.parametrize("layer", range(LAYOUT.layers))
def test_reads_follow_the_block_table(pool: KvPool, layer: int) -> None:
    as_written(pool).copy_(torch.randn(as_written(pool).shape))
    table = [[3, 0], [6, 6]]
    k, v = pool.read(layer, pool.read_index(torch.tensor(table)))
    for row, blocks in enumerate(table):
        for index, got in enumerate((k, v)):
            expected = torch.cat([as_written(pool)[block, layer, index] for block in blocks], dim=1)
            assert torch.equal(got[row], expected)


def test_clear_touches_only_its_blocks(pool: KvPool) -> None:
    as_written(pool).fill_(1)
    pool.clear(torch.tensor([0, 4]))
    sums = as_written(pool).flatten(1).sum(1).tolist()
    full = LAYOUT.block_nbytes / 4
    assert sums == [0, full, full, full, 0, full, full]


def test_another_process_reads_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    shared = KvPool(LAYOUT, 7, CPU, path)
    shared.write(2, shared.write_index(torch.tensor([5]), torch.tensor([3])), random_kv(1))
    other = Segment.open(path, 7, LAYOUT.block_nbytes)
    assert bytes(other.slot(5)) == as_written(shared)[5].numpy().tobytes()
    assert bytes(other.slot(4)) == bytes(LAYOUT.block_nbytes)
    other.close()
    shared.close()


def test_closing_removes_the_file_and_may_be_repeated(tmp_path: Path) -> None:
    shared = KvPool(LAYOUT, 7, CPU, tmp_path / "pool")
    shared.close()
    shared.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shared", [False, True])
def test_a_pool_larger_than_memory_is_refused(tmp_path: Path, shared: bool) -> None:
    with pytest.raises(OutOfMemory, match="bytes"):
        KvPool(LAYOUT, 2**46, CPU, tmp_path / "pool" if shared else None)
    assert list(tmp_path.iterdir()) == []
