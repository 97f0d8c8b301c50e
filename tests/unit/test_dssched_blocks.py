"""Blocks are held by one and given back once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssched.blocks import BlockPool


def test_taken_and_given_back() -> None:
    pool = BlockPool(4)
    first, rest = pool.take(1), pool.take(3)
    assert sorted(first + rest) == [0, 1, 2, 3]
    assert (pool.free, pool.held, pool.can_take(1), pool.can_take(0)) == (0, 4, False, True)
    pool.give(rest)
    assert (pool.free, pool.held) == (3, 1)


def test_more_than_there_are_cannot_be_taken() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.take(3)
    pool.validate()


def test_a_block_is_not_given_back_twice() -> None:
    pool = BlockPool(2)
    block = pool.take(1)
    pool.give(block)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give(block)


@given(st.integers(0, 12), st.lists(st.integers(-6, 6)))
def test_no_block_is_ever_in_two_places(blocks: int, steps: list[int]) -> None:
    pool = BlockPool(blocks)
    held: list[int] = []
    for step in steps:
        if step >= 0 and pool.can_take(step):
            held += pool.take(step)
        elif step < 0:
            pool.give(held[:-step])
            held = held[-step:]
        pool.validate()
        assert len(set(held)) == len(held) == pool.held
        assert pool.free == blocks - len(held)
