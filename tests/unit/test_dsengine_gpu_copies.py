"""KV from pool to pool without the host's memory between them; what is shared and opened is within this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from dsengine import gpu_copies
from dsengine.gpu_copies import GpuCopies
from dskv.handle import KvHandle
from dskv.segment import Segment
from dswire.errors import KvCorrupt, TransferFailed
from dswire.messages.kv import PoolInfo
from support.gpu_memory import SharedMemory
from support.handles import LAYOUT, make_handle, make_pool

THEIRS = (7, 3, 12, 1, 0)
OWN = (4, 9, 2, 11, 5)
BLOCKS = 16


class Side:
    """An instance's pool, and the copies into it."""

    def __init__(self, path: Path, memory: SharedMemory, seed: int) -> None:
        self.pool = make_pool(path, BLOCKS, seed=seed)
        self.copies = memory.copies(LAYOUT, self.pool)

    def offer(self) -> KvHandle:
        """KV in ``THEIRS``."""
        handle = make_handle(blocks=THEIRS, segment_blocks=BLOCKS, checksum=self.copies.seal(THEIRS, summed=True))
        return msgspec.structs.replace(
            handle, shards=(msgspec.structs.replace(handle.shards[0], gpu=self.copies.shared),)
        )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SharedMemory:
    # two blocks at once
    monkeypatch.setattr(gpu_copies, "_PART_NBYTES", 2 * LAYOUT.block_nbytes)
    return SharedMemory()


@pytest.fixture
def owner(tmp_path: Path, memory: SharedMemory) -> Iterator[Side]:
    side = Side(tmp_path / "owner", memory, 1)
    yield side
    side.pool.close()


@pytest.fixture
def reader(tmp_path: Path, memory: SharedMemory) -> Iterator[Side]:
    side = Side(tmp_path / "reader", memory, 2)
    yield side
    side.pool.close()


def content(pool: Segment) -> list[bytes]:
    return [bytes(pool.slot(block)) for block in range(pool.slots)]


def test_the_blocks_arrive_and_no_others_change(owner: Side, reader: Side) -> None:
    expected, theirs = content(reader.pool), content(owner.pool)
    reader.copies.fetch(owner.offer(), OWN, summed=True)
    for source, own in zip(THEIRS, OWN, strict=True):
        expected[own] = theirs[source]
    assert content(reader.pool) == expected
    assert content(owner.pool) == theirs


@pytest.mark.parametrize("block", THEIRS)
@pytest.mark.parametrize("byte", [0, 7, 100, LAYOUT.block_nbytes - 1])
def test_a_changed_byte_is_found(owner: Side, reader: Side, block: int, byte: int) -> None:
    handle = owner.offer()
    owner.pool.slot(block)[byte] ^= 0x80
    with pytest.raises(KvCorrupt, match="has checksum"):
        reader.copies.fetch(handle, OWN, summed=True)


@pytest.mark.parametrize("other", [8, 16, 128])
def test_changes_do_not_cancel_each_other(owner: Side, reader: Side, other: int) -> None:
    """Signs of two numbers, which are the highest bits of their words."""
    handle = owner.offer()
    block = owner.pool.slot(THEIRS[0])
    for byte in (7, 7 + other):
        block[byte] ^= 0x80
    with pytest.raises(KvCorrupt):
        reader.copies.fetch(handle, OWN, summed=True)


def test_blocks_in_another_order_are_found(owner: Side, reader: Side) -> None:
    handle = msgspec.structs.replace(owner.offer(), blocks=(THEIRS[1], THEIRS[0], *THEIRS[2:]))
    with pytest.raises(KvCorrupt):
        reader.copies.fetch(handle, OWN, summed=True)


def test_words_in_another_order_are_found(owner: Side, reader: Side) -> None:
    handle = owner.offer()
    block = owner.pool.slot(THEIRS[2])
    block[:16] = bytes(block[8:16]) + bytes(block[:8])
    with pytest.raises(KvCorrupt):
        reader.copies.fetch(handle, OWN, summed=True)


def test_nobody_sums_what_need_not_be(owner: Side, reader: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuCopies, "_checksum", None)
    assert owner.copies.seal(THEIRS, summed=False) == 0
    shard = msgspec.structs.replace(make_handle().shards[0], gpu=owner.copies.shared)
    handle = msgspec.structs.replace(make_handle(blocks=THEIRS, segment_blocks=BLOCKS), shards=(shard,))
    reader.copies.fetch(handle, OWN, summed=False)
    assert bytes(reader.pool.slot(OWN[4])) == bytes(owner.pool.slot(THEIRS[4]))


def test_an_owner_is_opened_once_in_its_life(
    owner: Side, reader: Side, tmp_path: Path, memory: SharedMemory
) -> None:
    for _ in range(2):
        reader.copies.fetch(owner.offer(), OWN, summed=True)
    assert memory.openings == 1
    again = Side(tmp_path / "again", memory, 3)
    reader.copies.fetch(again.offer(), OWN, summed=True)
    assert memory.openings == 2
    assert bytes(reader.pool.slot(OWN[0])) == bytes(again.pool.slot(THEIRS[0]))
    again.pool.close()


def test_an_owner_that_is_gone(owner: Side, reader: Side, memory: SharedMemory) -> None:
    handle = owner.offer()
    memory.shared.clear()
    for _ in range(2):
        with pytest.raises(TransferFailed, match="gone"):
            reader.copies.fetch(handle, OWN, summed=True)


def test_handles_that_cannot_be(owner: Side, reader: Side) -> None:
    handle = owner.offer()
    before = content(reader.pool)
    replace = msgspec.structs.replace
    with pytest.raises(KvCorrupt, match="5 blocks, 4 were reserved"):
        reader.copies.fetch(handle, OWN[:4], summed=True)
    with pytest.raises(KvCorrupt, match="lie otherwise"):
        reader.copies.fetch(replace(handle, layout=replace(LAYOUT, block_size=8)), OWN, summed=True)
    with pytest.raises(TransferFailed, match="has no block 99"):
        reader.copies.fetch(replace(handle, blocks=(*THEIRS[:4], 99)), OWN, summed=True)
    with pytest.raises(TransferFailed, match="does not share"):
        reader.copies.fetch(replace(handle, shards=make_handle().shards), OWN, summed=True)
    assert content(reader.pool) == before


def test_a_pool_is_read_to_prove_that_it_can_be(owner: Side, reader: Side, memory: SharedMemory) -> None:
    shards = owner.offer().shards
    assert reader.copies.read_rate("prefill-0", PoolInfo(LAYOUT, shards, BLOCKS)) > 0.0
    reader.copies.fetch(owner.offer(), OWN, summed=True)
    assert memory.openings == 1
    with pytest.raises(TransferFailed, match="does not share"):
        reader.copies.read_rate("prefill-1", PoolInfo(LAYOUT, make_handle().shards, BLOCKS))
    with pytest.raises(TransferFailed, match="lie otherwise"):
        reader.copies.read_rate("prefill-0", PoolInfo(msgspec.structs.replace(LAYOUT, layers=3), shards, BLOCKS))


def test_sums_say_nothing_of_the_place(owner: Side) -> None:
    """Equal KV in other blocks, as after a copy, has the same sum."""
    torch.frombuffer(owner.pool.buffer, dtype=torch.uint8).fill_(7)
    assert owner.copies.seal((0, 1), summed=True) == owner.copies.seal((5, 9), summed=True)
