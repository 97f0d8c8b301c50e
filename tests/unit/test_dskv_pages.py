"""Which blocks of a mirror have memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskv.handle import KvKey
from dskv.layout import KvLayout
from dskv.memory import RankPools
from dskv.pages import MirrorPages
from dskv.segment import Segment
from dswire.errors import TransferFailed

#: a block is two pages
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=mmap.PAGESIZE // 64, block_size=4, dtype="float32")
BLOCKS = 8


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Segment]:
    made = Segment.create(tmp_path / "mirror", BLOCKS, LAYOUT.block_nbytes, sparse=True)
    yield made
    made.close()


def key(number: int) -> KvKey:
    return KvKey(f"r{number}/0", 0)


def had(mirror: Segment) -> float:
    """Blocks that have pages."""
    return mirror.path.stat().st_blocks * 512 / LAYOUT.block_nbytes


def test_pages_come_before_a_block_is_written_and_go_with_the_last_who_holds_it(mirror: Segment) -> None:
    pages = MirrorPages(RankPools.of(LAYOUT, mirror), 0)
    assert had(mirror) == 0
    pages.hold(key(1), (0, 5, 1))
    assert had(mirror) == 3
    mirror.slot(5)[:] = b"x" * LAYOUT.block_nbytes
    pages.hold(key(2), (5, 2))
    pages.let_go(key(1))
    assert had(mirror) == 2
    assert bytes(mirror.slot(5)) == b"x" * LAYOUT.block_nbytes
    pages.let_go(key(1))
    pages.let_go(key(2))
    assert had(mirror) == 0


def test_some_are_kept_those_first_that_were_let_go_last(mirror: Segment) -> None:
    pages = MirrorPages(RankPools.of(LAYOUT, mirror), 2)
    for number in range(4):
        pages.hold(key(number), (number,))
        mirror.slot(number)[:1] = b"x"
    for number in (3, 1, 0, 2):
        pages.let_go(key(number))
    assert had(mirror) == 2
    assert [bytes(mirror.slot(number)[:1]) for number in range(4)] == [b"x", b"\0", b"x", b"\0"]


@given(st.lists(st.tuples(st.integers(0, 4), st.sets(st.integers(0, BLOCKS - 1))), max_size=20), st.integers(0, 3))
def test_what_is_held_has_pages_and_little_else(deeds: list[tuple[int, set[int]]], spare: int) -> None:
    mirror = _Counted()
    pages = MirrorPages(mirror, spare)
    held: dict[int, set[int]] = {}
    for number, blocks in deeds:
        if number in held:
            pages.let_go(key(number))
            del held[number]
        else:
            pages.hold(key(number), tuple(blocks))
            held[number] = blocks
        wanted = set().union(*held.values())
        assert wanted <= mirror.had
        assert len(mirror.had - wanted) <= spare


def test_what_finds_no_memory_holds_nothing(mirror: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = MirrorPages(RankPools.of(LAYOUT, mirror), 8)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", _raiser(full))
    with pytest.raises(TransferFailed, match="no room for 2 slots"):
        pages.hold(key(1), (0, 1))
    monkeypatch.undo()
    pages.hold(key(1), (0,))
    assert had(mirror) == 1


def _raiser(error: OSError) -> object:
    def fail(*_: object) -> None:
        raise error

    return fail


class _Counted(RankPools):
    """Knows what it was told of pages, and has none."""

    def __init__(self) -> None:
        self.had: set[int] = set()

    def reserve(self, numbers: object) -> None:
        assert isinstance(numbers, list)
        self.had |= set(numbers)

    def discard(self, numbers: object) -> None:
        assert isinstance(numbers, list)
        self.had -= set(numbers)
