"""Blocks are copied whole and summed as the checksum has it, with a compiler and without one."""

from __future__ import annotations

import ctypes
import logging
import random
from collections.abc import Iterator

import pytest

from dshost.library import compiler
from dskv.checksum import block_sum
from dskv.copying import SMALL_NBYTES, Copier, copier, plain

SLOTS = 5
#: around the shortest that the compiled sum takes, its stripes and rounds of 64 and 1,024 bytes; past the caches
SIZES = [1, 64, 240, 241, 256, 257, 1023, 1024, 1025, 1088, 1089, 2048, 2049, 5000, SMALL_NBYTES, SMALL_NBYTES + 8]


@pytest.fixture(params=["plain", "compiled"])
def copy(request: pytest.FixtureRequest) -> Iterator[Copier]:
    if request.param == "plain":
        yield plain
        return
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    copier.cache_clear()
    assert copier() is not plain
    yield copier()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
def test_scattered_blocks(copy: Copier, nbytes: int, summed: bool) -> None:
    source, target = (ctypes.create_string_buffer(SLOTS * nbytes) for _ in range(2))
    source.raw = random.Random(nbytes).randbytes(SLOTS * nbytes)
    theirs, mine = (4, 0, 2), (1, 3, 0)
    sums = copy(ctypes.addressof(target), ctypes.addressof(source), nbytes, mine, theirs, summed=summed)
    slots = [source.raw[block * nbytes : (block + 1) * nbytes] for block in theirs]
    expected = [bytes(nbytes)] * SLOTS
    for place, data in zip(mine, slots, strict=True):
        expected[place] = data
    assert target.raw == b"".join(expected)
    assert sums == (b"".join(block_sum(memoryview(data)) for data in slots) if summed else b"")


def test_blocks_that_begin_anywhere(copy: Copier) -> None:
    """Stores past the caches want whole registers' addresses."""
    nbytes = SMALL_NBYTES + 64
    data = random.Random(0).randbytes(nbytes)
    for shift in (0, 1, 32):
        source, target = ctypes.create_string_buffer(bytes(shift) + data), ctypes.create_string_buffer(nbytes + 64)
        start = ctypes.addressof(target) + 64 - shift
        sums = copy(start, ctypes.addressof(source) + shift, nbytes, (0,), (0,), summed=True)
        assert target.raw[64 - shift :][:nbytes] == data
        assert sums == block_sum(memoryview(data))


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(copier.cache_clear)
    copier.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert copier() is plain
    assert "without compiled help" in caplog.text
    assert "install g++" in caplog.text
