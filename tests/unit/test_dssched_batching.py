"""Prefill batches, decode admission, preemption."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssched.batching import chunk, decode_may_admit, prefill_batch

LENGTHS = st.lists(st.integers(1, 100), max_size=12)


def batch(lengths: list[int], *, target: int = 64, most: int = 8, free: int = 1000) -> int:
    return prefill_batch(lengths, target_tokens=target, max_sequences=most, free_blocks=free, block_size=4)


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([], 0),
        ([64], 1),
        ([32, 32], 2),
        ([32, 33], 1),
        ([10, 20, 30, 40], 3),
        # longer than Lm: alone, wherever it stands
        ([500, 1], 1),
        ([1, 500], 1),
        ([1] * 20, 8),
    ],
)
def test_batches_fill_up_to_the_target(lengths: list[int], count: int) -> None:
    assert batch(lengths) == count


def test_nobody_overtakes_a_head_that_waits_for_blocks() -> None:
    assert batch([40, 1], free=9) == 0
    assert batch([40, 1], free=10) == 1
    assert batch([1, 40, 1], free=9) == 1


@given(LENGTHS, st.integers(1, 80), st.integers(1, 10), st.integers(0, 60))
def test_a_batch_is_the_longest_head_that_fits(lengths: list[int], target: int, most: int, free: int) -> None:
    def fits(count: int) -> bool:
        head = lengths[:count]
        blocks = sum(-(-length // 4) for length in head)
        return blocks <= free and count <= most and (count <= 1 or sum(head) <= target)

    count = batch(lengths, target=target, most=most, free=free)
    assert fits(count)
    assert count == len(lengths) or not fits(count + 1)


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
