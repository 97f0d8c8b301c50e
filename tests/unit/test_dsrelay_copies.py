"""The memory of kept KV: in from owners of any shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools, whole_model
from dskv.receive import Receiver
from dskv.segment import SegmentCache
from dsrelay.copies import KeptMemory
from dsrelay.events import CopyKept
from support.handles import LAYOUT, ranks

TOKENS = 10
BLOCKS = (0, 1, 2)
KEPT = (2, 7, 1)


@pytest.fixture
def memory() -> Iterator[KeptMemory]:
    made = KeptMemory()
    yield made
    made.close()


def handles(owner: RankPools, directory: Path) -> tuple[KvHandle, KvHandle]:
    """What an owner offers, and the same as a keeper will own it."""
    key, shards = KvKey("r1/0", 0), owner.placement.shards
    offered = KvHandle(key, "prefill-0", "n0", LAYOUT, TOKENS, BLOCKS, shards, 10, owner.checksum(BLOCKS))
    mine = (whole_model(LAYOUT, str(directory / "relay.keep")),)
    return offered, msgspec.structs.replace(offered, owner="relay-n0", blocks=KEPT, shards=mine, segment_blocks=9)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
async def test_a_copy_is_what_its_owner_had(tmp_path: Path, memory: KeptMemory, tp: int, pp: int) -> None:
    with ranks(tmp_path / "owner", tp, pp, LAYOUT.block_size, tokens=TOKENS) as owner:
        handle, kept = handles(owner, tmp_path)
        assert await memory.keep(CopyKept(handle, kept)) is None
    with ranks(tmp_path / "reader", 1, 1, LAYOUT.block_size) as reader:
        receiver = Receiver(kept, reader, (4, 5, 6))
        mapped = SegmentCache()
        receiver.copy_direct(RankPools.map(kept.layout, kept.shards, kept.segment_blocks, mapped))
        mapped.close()
        receiver.verify()


async def test_an_owner_that_is_gone_is_told(tmp_path: Path, memory: KeptMemory) -> None:
    with ranks(tmp_path / "owner", 1, 1, LAYOUT.block_size, tokens=TOKENS) as owner:
        handle, kept = handles(owner, tmp_path)
    error = await memory.keep(CopyKept(handle, kept))
    assert error is not None
    assert error.code == "transfer_failed"
    assert not (tmp_path / "relay.keep").exists()
