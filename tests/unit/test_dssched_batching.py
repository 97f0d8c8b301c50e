"""Chunks of prompts, and the admission of sequences to decode."""

from __future__ import annotations

import pytest

from dssched.batching import chunk, decode_may_admit


def test_admission_keeps_a_block_for_each_that_runs() -> None:
    assert decode_may_admit(4, 7, running=3)
    assert not decode_may_admit(4, 6, running=3)
    # alone it may have everything
    assert decode_may_admit(7, 7, running=0)
    assert not decode_may_admit(8, 7, running=0)


@pytest.mark.parametrize(
    ("left", "room", "whole", "count"),
    [
        (10, 20, 0, 10),
        (20, 20, 0, 20),
        (30, 20, 0, 20),
        (30, 0, 0, 0),
        # up to 40 tokens stay together
        (30, 20, 40, 0),
        (40, 40, 40, 40),
        (41, 40, 40, 40),
        (41, 1, 40, 1),
    ],
)
def test_chunks(left: int, room: int, whole: int, count: int) -> None:
    assert chunk(left, room, whole) == count
