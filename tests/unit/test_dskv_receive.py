"""The copies of a hand-off, staged and direct, and what verification catches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskv.handle import KvHandle
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import Segment
from dskv.send import plan, stage
from dswire.errors import KvCorrupt, TransferFailed
from dswire.messages.kv import Chunk
from support.handles import LAYOUT, make_handle, make_pool, offered, ranks

SIZE = LAYOUT.block_nbytes
BLOCKS = (5, 2, 9, 0, 7)
OWN = (1, 3, 5, 7, 9)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Segment]:
    pool = make_pool(tmp_path / "source.kv")
    yield pool
    pool.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Segment]:
    made = Segment.create(tmp_path / "own.kv", 12, SIZE)
    yield made
    made.close()


@pytest.fixture
def handle(source: Segment) -> KvHandle:
    return offered(source, "r1/0", BLOCKS, owner="prefill-0", node="n0")


def alone(segment: Segment) -> RankPools:
    """An instance of one rank."""
    return RankPools.of(LAYOUT, segment)


def assert_arrived(source: Segment, pool: Segment) -> None:
    for theirs, mine in zip(BLOCKS, OWN, strict=True):
        assert bytes(pool.slot(mine)) == bytes(source.slot(theirs))


def test_a_direct_copy_arrives_and_verifies(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), (*OWN, 11))
    receiver.copy_direct(alone(source))
    receiver.verify()
    assert receiver.complete
    assert_arrived(source, pool)
    assert not any(pool.slot(11)), "a block reserved beyond the handle's is left alone"


@pytest.mark.parametrize("slot_blocks", [1, 2, 5, 8])
def test_staged_chunks_arrive_and_verify(
    source: Segment, pool: Segment, handle: KvHandle, slot_blocks: int
) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    slot = memoryview(bytearray(slot_blocks * SIZE + 17))
    for chunk in plan(len(BLOCKS), SIZE, len(slot)):
        assert stage(alone(source), handle, chunk, slot) == chunk.count * SIZE
        receiver.take(chunk, slot)
    receiver.verify()
    assert_arrived(source, pool)


def test_a_flipped_bit_is_told(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    slot = memoryview(bytearray(5 * SIZE))
    stage(alone(source), handle, Chunk(0, 0, 5), slot)
    slot[3 * SIZE] ^= 4
    receiver.take(Chunk(0, 0, 5), slot)
    with pytest.raises(KvCorrupt, match=r"r1/0#0: the KV from prefill-0 has checksum"):
        receiver.verify()


@pytest.mark.parametrize("path", ["direct", "staged"])
def test_without_sums_all_must_come_and_none_is_compared(
    source: Segment, pool: Segment, handle: KvHandle, path: str
) -> None:
    unsummed = msgspec.structs.replace(handle, checksum=0)
    receiver = Receiver(unsummed, alone(pool), OWN, summed=False)
    with pytest.raises(TransferFailed, match="0 of 5 blocks"):
        receiver.verify()
    if path == "direct":
        receiver.copy_direct(alone(source))
    else:
        slot = memoryview(bytearray(5 * SIZE))
        stage(alone(source), unsummed, Chunk(0, 0, 5), slot)
        receiver.take(Chunk(0, 0, 5), slot)
    receiver.verify()
    assert_arrived(source, pool)


def test_missing_blocks_are_told(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    slot = memoryview(bytearray(2 * SIZE))
    stage(alone(source), handle, Chunk(0, 0, 2), slot)
    receiver.take(Chunk(0, 0, 2), slot)
    with pytest.raises(TransferFailed, match="2 of 5 blocks"):
        receiver.verify()
    with pytest.raises(TransferFailed, match="another way"):
        receiver.copy_direct(alone(source))


@pytest.mark.parametrize(
    "chunk",
    [Chunk(1, 0, 2), Chunk(0, 1, 2), Chunk(0, 0, 0), Chunk(0, 0, -1), Chunk(0, 0, 6), Chunk(0, 0, 5)],
    ids=["index", "gap", "empty", "negative", "too many", "more than the data"],
)
def test_a_wrong_chunk_changes_nothing(pool: Segment, handle: KvHandle, chunk: Chunk) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    with pytest.raises(TransferFailed):
        receiver.take(chunk, memoryview(bytes(4 * SIZE)))
    assert receiver.taken == 0
    assert all(not any(pool.slot(block)) for block in OWN)


def test_a_duplicate_chunk_is_refused(pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    data = memoryview(bytes(2 * SIZE))
    receiver.take(Chunk(0, 0, 2), data)
    with pytest.raises(TransferFailed, match="chunk 0 at block 0 came where chunk 1 at block 2 is due"):
        receiver.take(Chunk(0, 0, 2), data)


def test_another_layout_or_number_of_blocks_is_refused(pool: Segment, handle: KvHandle) -> None:
    with pytest.raises(KvCorrupt, match="4 were reserved"):
        Receiver(handle, alone(pool), OWN[:4])
    wide = msgspec.structs.replace(handle, layout=msgspec.structs.replace(LAYOUT, dtype="float32"))
    with pytest.raises(KvCorrupt, match="does not fit the pool"):
        Receiver(wide, alone(pool), OWN)


@pytest.mark.parametrize("chunk", [Chunk(0, 4, 2), Chunk(0, -1, 1), Chunk(0, 0, 0), Chunk(0, 0, 3)])
def test_the_owner_stages_no_chunk_that_is_not_there(source: Segment, handle: KvHandle, chunk: Chunk) -> None:
    with pytest.raises(TransferFailed):
        stage(alone(source), handle, chunk, memoryview(bytearray(2 * SIZE)))


def test_a_block_larger_than_a_slot_is_refused() -> None:
    with pytest.raises(TransferFailed) as caught:
        plan(3, 1000, 999)
    assert "relay.slot" in caught.value.remedy


#: tp, pp and block size of the owner and of the reader
UNEQUAL = [((2, 2, 4), (1, 1, 4)), ((1, 1, 4), (2, 2, 4)), ((2, 1, 4), (4, 2, 2)), ((1, 2, 2), (2, 1, 8))]
#: more than the last block of any of them is full
TOKENS = 11


@pytest.mark.parametrize(("owners", "readers"), UNEQUAL, ids=str)
@pytest.mark.parametrize("path", ["direct", "staged"])
def test_unequal_sides_verify_and_find_a_flipped_bit(
    tmp_path: Path, owners: tuple[int, int, int], readers: tuple[int, int, int], path: str
) -> None:
    with ranks(tmp_path / "owner", *owners, tokens=TOKENS) as owner, ranks(tmp_path / "own", *readers) as reader:
        layout = owner.placement.layout
        blocks = range(layout.blocks_for(TOKENS))
        handle = make_handle(blocks=blocks, checksum=owner.checksum(blocks))
        handle = msgspec.structs.replace(handle, layout=layout, tokens=TOKENS)
        hand_over(handle, owner, reader, path)
        for rank in range(len(owner.placement.shards)):
            owner.block(rank, 1)[0] ^= 1
            with pytest.raises(KvCorrupt):
                hand_over(handle, owner, reader, path)
            owner.block(rank, 1)[0] ^= 1


def hand_over(handle: KvHandle, owner: RankPools, reader: RankPools, path: str) -> None:
    """One whole hand-off, into blocks that are full of something else."""
    own = (9, 4, 7, 1, 8, 2)
    for rank in range(len(reader.placement.shards)):
        for number in own:
            reader.block(rank, number)[:] = b"\xaa" * len(reader.block(rank, number))
    receiver = Receiver(handle, reader, own)
    if path == "direct":
        receiver.copy_direct(owner)
    else:
        slot = memoryview(bytearray(2 * handle.layout.block_nbytes + 5))
        for chunk in plan(len(handle.blocks), handle.layout.block_nbytes, len(slot)):
            stage(owner, handle, chunk, slot)
            receiver.take(chunk, slot)
    receiver.verify()


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 63))
def test_a_plan_covers_every_block_once_in_order(blocks: int, each: int, rest: int) -> None:
    chunks = plan(blocks, 64, each * 64 + rest)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    covered = [at for chunk in chunks for at in range(chunk.first, chunk.first + chunk.count)]
    assert covered == list(range(blocks))
    assert all(chunk.count == each for chunk in chunks[:-1])


def test_a_plan_of_an_empty_handle_is_empty() -> None:
    assert plan(0, 64, 64) == ()
    assert make_handle(blocks=(3,)).nbytes == SIZE
