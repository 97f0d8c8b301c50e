"""Large messages do not pay for fresh memory each time."""

from __future__ import annotations

import resource

import pytest

from dswire import heap

_NBYTES = 8 << 20
_AT_ONCE = 6


def test_memory_that_was_freed_is_used_again() -> None:
    if not heap.keep(2 * _AT_ONCE * _NBYTES):
        pytest.skip("this C library has no mallopt")
    _hold_and_free()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        _hold_and_free()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < _AT_ONCE * _NBYTES // resource.getpagesize(), "not even once was all of it fresh"


def _hold_and_free() -> None:
    held = [bytearray(_NBYTES) for _ in range(_AT_ONCE)]
    assert len(held) == _AT_ONCE
