"""The copies of a hand-off, direct and by a stream, and what verification catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from dskv.handle import KvHandle
from dskv.memory import CanonicalBlocks, RankPools, copy
from dskv.receive import Receiver
from dskv.segment import Segment
from dswire.errors import KvCorrupt, TransferFailed
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


def test_blocks_that_are_read_arrive_and_verify(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    receiver.receive(reading(alone(source), handle))
    receiver.verify()
    assert_arrived(source, pool)


def test_a_flipped_bit_is_told(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver = Receiver(handle, alone(pool), OWN)
    source.slot(BLOCKS[3])[7] ^= 4
    receiver.receive(reading(alone(source), handle))
    with pytest.raises(KvCorrupt, match=r"r1/0#0: the KV from prefill-0 has checksum"):
        receiver.verify()


@pytest.mark.parametrize("path", ["direct", "read"])
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
        receiver.receive(reading(alone(source), unsummed))
    receiver.verify()
    assert_arrived(source, pool)


def test_missing_blocks_are_told(source: Segment, pool: Segment, handle: KvHandle) -> None:
    receiver, read = Receiver(handle, alone(pool), OWN), reading(alone(source), handle, blocks=2)
    with pytest.raises(TransferFailed, match="no more"):
        receiver.receive(read)
    with pytest.raises(TransferFailed, match="2 of 5 blocks"):
        receiver.verify()
    with pytest.raises(TransferFailed, match="another way"):
        receiver.copy_direct(alone(source))


def test_another_layout_or_number_of_blocks_is_refused(pool: Segment, handle: KvHandle) -> None:
    with pytest.raises(KvCorrupt, match="4 were reserved"):
        Receiver(handle, alone(pool), OWN[:4])
    wide = msgspec.structs.replace(handle, layout=msgspec.structs.replace(LAYOUT, dtype="float32"))
    with pytest.raises(KvCorrupt, match="does not fit the pool"):
        Receiver(wide, alone(pool), OWN)


def reading(owner: RankPools, handle: KvHandle, blocks: int = 1_000) -> Callable[[memoryview], None]:
    """What a stream of the handle's first ``blocks`` blocks reads."""
    numbers = iter(handle.blocks[:blocks])

    def read(target: memoryview) -> None:
        number = next(numbers, None)
        if number is None:
            raise TransferFailed("no more has come")
        copy(owner, [number], CanonicalBlocks(handle.layout, target), [0], 0, handle.layout.block_size)

    return read


#: tp, pp and block size of the owner and of the reader
UNEQUAL = [((2, 2, 4), (1, 1, 4)), ((1, 1, 4), (2, 2, 4)), ((2, 1, 4), (4, 2, 2)), ((1, 2, 2), (2, 1, 8))]
#: more than the last block of any of them is full
TOKENS = 11


@pytest.mark.parametrize(("owners", "readers"), UNEQUAL, ids=str)
@pytest.mark.parametrize("path", ["direct", "read"])
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
        receiver.receive(reading(owner, handle))
    receiver.verify()
