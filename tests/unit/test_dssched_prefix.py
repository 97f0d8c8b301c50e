"""Blocks that several sequences share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dssched.prefix import PrefixIndex, PrefixPool, digests

SIZE = 4


def known(pool: PrefixPool, tokens: Sequence[int]) -> list[int]:
    return pool.known(pool.chain(tokens))


def test_digests_tell_all_that_comes_before() -> None:
    one, other = list(range(12)), [99, *range(1, 12)]
    assert len(digests(one, SIZE)) == 3
    assert len(digests(one[:11], SIZE)) == 2
    assert digests(one[:11], SIZE) == digests(one, SIZE)[:2]
    assert set(digests(one, SIZE)).isdisjoint(digests(other, SIZE))


def test_a_prompt_finds_the_blocks_of_another() -> None:
    pool = PrefixPool(8, SIZE, keep=True)
    tokens = list(range(12))
    blocks = pool.take(3)
    assert known(pool, tokens) == []
    pool.remember(tokens, blocks)
    # the last token is always computed
    assert known(pool, tokens) == blocks[:2]
    assert known(pool, [*tokens, 12]) == blocks
    assert known(pool, [*tokens[:5], 77, *tokens[6:]]) == blocks[:1]
    shared = pool.take(4, known(pool, [*tokens, 12]))
    assert shared[:3] == blocks
    assert (pool.held, pool.free) == (4, 4)
    pool.give(blocks)
    assert pool.held == 4
    pool.give(shared)
    assert (pool.held, pool.free, pool.kept) == (0, 8, 3)


def test_what_was_unused_for_longest_makes_room_and_ends_go_before_beginnings() -> None:
    pool = PrefixPool(4, SIZE, keep=True)
    old, new = list(range(8)), list(range(50, 58))
    for tokens in (old, new):
        blocks = pool.take(2)
        pool.remember(tokens, blocks)
        pool.give(blocks)
    pool.take(1)
    assert [len(known(pool, [*tokens, 0])) for tokens in (old, new)] == [1, 2]
    pool.take(2)
    assert [len(known(pool, [*tokens, 0])) for tokens in (old, new)] == [0, 1]


def test_known_blocks_that_nobody_holds_cost_what_is_free() -> None:
    pool = PrefixPool(4, SIZE, keep=True)
    tokens = list(range(9))
    blocks = pool.take(3)
    pool.remember(tokens, blocks)
    held = known(pool, tokens)
    assert pool.cost(3, held) == 1
    pool.give(blocks)
    assert pool.cost(3, held) == 3
    pool.take(2)
    with pytest.raises(AssertionError, match="3 blocks wanted"):
        pool.take(3, held)


def test_distrusted_blocks_are_forgotten() -> None:
    pool = PrefixPool(4, SIZE, keep=True)
    blocks = pool.take(2)
    pool.remember(range(8), blocks)
    pool.distrust(blocks)
    assert known(pool, range(9)) == []
    pool.give(blocks)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give(blocks)


def test_nothing_is_kept_where_that_is_not_wanted() -> None:
    pool = PrefixPool(4, SIZE, keep=False)
    blocks = pool.take(2)
    pool.remember(range(8), blocks)
    assert known(pool, range(8)) == []
    assert pool.kept == 0


class Sequences(RuleBasedStateMachine):
    """Sequences come and go; what a shared block holds is always what its sequences want."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PrefixPool(10, SIZE, keep=True)
        self.content: dict[int, tuple[int, ...]] = {}
        self.held: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def come(self, tokens: list[int]) -> None:
        found = known(self.pool, tokens)
        count = -(-len(tokens) // SIZE)
        if self.pool.cost(count, found) > self.pool.free:
            return
        blocks = self.pool.take(count, found)
        for place, block in enumerate(blocks):
            content = tuple(tokens[: (place + 1) * SIZE])
            if place < len(found):
                assert self.content[block] == content
            else:
                assert all(block not in other for other, _ in self.held)
                self.content[block] = content
        self.pool.remember(tokens, blocks)
        self.held.append((blocks, tokens))

    @rule(data=st.data(), good=st.booleans())
    def go(self, data: st.DataObject, good: bool) -> None:
        if self.held:
            blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            if not good:
                self.pool.distrust(blocks)
            self.pool.give(blocks)

    @invariant()
    def valid(self) -> None:
        self.pool.validate()


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_an_index_knows_what_was_noted_last() -> None:
    index = PrefixIndex(3, SIZE)
    old, new = digests(range(8), SIZE), digests(range(50, 58), SIZE)
    index.note(old)
    assert (index.found(old), index.found(new), index.found([])) == (8, 0, 0)
    index.note(new)
    # one block had to go: the end of the older prompt
    assert (index.found(old), index.found(new)) == (4, 8)
