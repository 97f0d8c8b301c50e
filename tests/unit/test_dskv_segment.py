"""Who may make a segment, and what is left of it."""

from __future__ import annotations

import ctypes
import re
import threading
from pathlib import Path

import pytest

from dskv.segment import Segment, SegmentCache
from dswire.errors import DuplicateName, OutOfMemory, TransferFailed


def test_a_live_owner_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    owner = Segment.create(path, 4, 64)
    owner.slot(2)[:3] = b"abc"
    with pytest.raises(DuplicateName, match="a live process of that name"):
        Segment.create(path, 4, 64)
    reader = Segment.open(path, 4, 64)
    assert bytes(reader.slot(2)[:3]) == b"abc"
    reader.close()
    owner.close()
    assert not path.exists()


def test_a_reader_is_no_owner(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    first = Segment.create(path, 4, 64)
    reader = Segment.open(path, 4, 64)
    first.close()
    second = Segment.create(path, 4, 64)
    reader.close()
    assert path.exists()
    second.close()


def test_what_a_dead_owner_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    path.write_bytes(b"x" * 256)
    made = Segment.create(path, 4, 64)
    assert bytes(made.slot(0)) == bytes(64)
    made.close()


def test_a_replaced_file_is_mapped_anew(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    cache = SegmentCache()
    first = Segment.create(path, 4, 64)
    first.slot(1)[:1] = b"1"
    assert bytes(cache.get(str(path), 4, 64).slot(1)[:1]) == b"1"
    first.close()
    with pytest.raises(TransferFailed, match="cannot be mapped"):
        cache.get(str(path), 4, 64)
    second = Segment.create(path, 4, 64)
    second.slot(1)[:1] = b"2"
    assert bytes(cache.get(str(path), 4, 64).slot(1)[:1]) == b"2"
    cache.close()
    second.close()


def test_warming_has_all_pages_and_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    made = Segment.create(path, 5, 1_000_000)
    made.slot(3)[:3] = b"abc"
    made.warm()
    assert made.warmed(60.0)
    assert path.stat().st_blocks * 512 >= 5_000_000
    assert bytes(made.slot(3)[:4]) == b"abc\0"
    made.close()


def test_warming_maps_what_another_process_has_written(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    made = Segment.create(path, 5, 1_000_000)
    for slot in range(5):
        made.slot(slot)[:] = bytes([slot + 1]) * 1_000_000
    if not populates(made):
        pytest.skip("this system maps pages when they are touched only")
    cache = SegmentCache(warm=True)
    mapped = cache.get(str(path), 5, 1_000_000)
    assert mapped.warmed(60.0)
    # the owner's mapping and this one
    assert [resident >= 5_000_000 for resident in resident_nbytes(path)] == [True, True]
    assert bytes(mapped.slot(4)) == bytes(made.slot(4))
    cache.close()
    made.close()


def test_warming_makes_no_pages_where_another_process_has_none(tmp_path: Path) -> None:
    path = tmp_path / "pool.kv"
    made = Segment.create(path, 5, 4 << 20, sparse=True)
    made.reserve([3])
    cache = SegmentCache(warm=True)
    assert cache.get(str(path), 5, 4 << 20).warmed(60.0)
    assert path.stat().st_blocks * 512 == 4 << 20
    cache.close()
    made.close()


def test_a_sparse_one_need_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="of shared memory are wanted"):
        Segment.create(tmp_path / "pool.kv", 1 << 22, 1 << 20)
    made = Segment.create(tmp_path / "pool.kv", 1 << 22, 1 << 20, sparse=True)
    made.close()


def populates(segment: Segment) -> bool:
    address = ctypes.addressof(ctypes.c_char.from_buffer(segment.buffer))
    refused: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), 22)
    return not refused


def resident_nbytes(path: Path) -> list[int]:
    """Of each mapping of the file in this process."""
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: *(\d+) kB", Path("/proc/self/smaps").read_text())
    return [int(kib) * 1024 for kib in found]


def test_closing_ends_the_warming(tmp_path: Path) -> None:
    before = threading.active_count()
    made = Segment.create(tmp_path / "pool.kv", 64, 1_000_000)
    made.warm()
    made.close()
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())
