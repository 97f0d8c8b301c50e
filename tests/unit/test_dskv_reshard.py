"""Every (layer, head, token) reaches each rank that holds it, once, from a rank that has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dskv.layout import KvLayout
from dskv.memory import CanonicalBlocks, copy
from dskv.reshard import Placement, canonical, difference, plan, runs
from dskv.shards import shards

HEAD_DIM = 2


def placed(layout: KvLayout, tp: int, pp: int) -> Placement:
    return Placement(layout, shards(layout, tp, pp, [f"rank{rank}" for rank in range(tp * pp)]))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement, int]:
    """Two placements of one model, and a number of tokens."""
    layers, heads = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 4, 6]))
    sides = []
    for _ in range(2):
        tp, pp = draw(st.integers(1, 8)), draw(st.integers(1, layers))
        assume(heads % tp == 0 or tp % heads == 0)
        layout = KvLayout(layers, heads, HEAD_DIM, draw(st.sampled_from([1, 2, 3, 4, 8])), "float16")
        sides.append(placed(layout, tp, pp))
    return sides[0], sides[1], draw(st.integers(1, 20))


class RankBytes:
    """An instance's blocks: each byte of a rank's blocks can be told apart."""

    def __init__(self, placement: Placement, blocks: int) -> None:
        self.placement = placement
        sizes = [shard.layout(placement.layout).block_nbytes for shard in placement.shards]
        self.blocks = [[bytearray(size) for _ in range(blocks)] for size in sizes]

    def block(self, rank: int, number: int) -> memoryview:
        return memoryview(self.blocks[rank][number])


def elements(placement: Placement, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """(layer, K or V, head, token of the block) in the order in which a rank's block holds them."""
    shard = placement.shards[rank]
    for layer in range(shard.first_layer, shard.end_layer):
        for side in range(2):
            for head in range(shard.first_head, shard.end_head):
                for token in range(placement.layout.block_size):
                    yield layer, side, head, token


def content(layer: int, side: int, head: int, token: int) -> bytes:
    """What the model wrote for a token: not zero, and hardly ever the same twice."""
    return (1 + hash((layer, side, head, token)) % 0xFFFFFFFE).to_bytes(4, "little")


def filled(placement: Placement, tokens: int) -> RankBytes:
    """Blocks that hold ``tokens`` tokens of a model, and zeros behind them."""
    memory = RankBytes(placement, placement.layout.blocks_for(tokens))
    for rank, blocks in enumerate(memory.blocks):
        for number, block in enumerate(blocks):
            for place, (layer, side, head, at) in enumerate(elements(placement, rank)):
                token = number * placement.layout.block_size + at
                if token < tokens:
                    block[place * 4 : place * 4 + 4] = content(layer, side, head, token)
    return memory


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_each_rank_gets_all_that_it_holds_once_and_nothing_else(case: tuple[Placement, Placement, int]) -> None:
    source, target, tokens = case
    reached: Counter[tuple[int, int, int, int]] = Counter()
    for box in plan(source, target, 0, tokens):
        have, want = source.shards[box.source], target.shards[box.target]
        assert have.first_layer <= box.layers[0] < box.layers[1] <= have.end_layer
        assert have.first_head <= box.heads[0] < box.heads[1] <= have.end_head
        assert want.first_layer <= box.layers[0] < box.layers[1] <= want.end_layer
        assert want.first_head <= box.heads[0] < box.heads[1] <= want.end_head
        for side, block in ((source, box.source_block), (target, box.target_block)):
            size = side.layout.block_size
            assert block * size <= box.tokens[0] < box.tokens[1] <= (block + 1) * size
        for layer in range(*box.layers):
            for head in range(*box.heads):
                for token in range(*box.tokens):
                    reached[box.target, layer, head, token] += 1
    wanted = Counter(
        (rank, layer, head, token)
        for rank, shard in enumerate(target.shards)
        for layer in range(shard.first_layer, shard.end_layer)
        for head in range(shard.first_head, shard.end_head)
        for token in range(tokens)
    )
    assert reached == wanted


@given(pairs(), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_bytes_lie_where_the_other_side_looks_for_them(
    case: tuple[Placement, Placement, int], cut: int
) -> None:
    source, target, tokens = case
    given_, wanted = filled(source, tokens), filled(target, tokens)
    got = RankBytes(target, target.layout.blocks_for(tokens))
    numbers = range(source.layout.blocks_for(tokens)), range(target.layout.blocks_for(tokens))
    for first, end in ((0, min(cut, tokens)), (min(cut, tokens), tokens)):
        copy(given_, numbers[0], got, numbers[1], first, end)
    assert got.blocks == wanted.blocks


def test_equal_placements_are_one_run_a_block_and_rank() -> None:
    layout = KvLayout(layers=4, kv_heads=4, head_dim=2, block_size=4, dtype="float16")
    same = placed(layout, 2, 2)
    boxes = list(plan(same, same, 0, 8))
    assert sorted((box.source, box.target) for box in boxes) == [
        (rank, rank) for rank in range(4) for _ in range(2)
    ]
    assert {len(runs(box, same, same)) for box in boxes} == {1}
    assert {run.nbytes for box in boxes for run in runs(box, same, same)} == {layout.block_nbytes // 4}


def test_stages_alone_make_one_run_of_all_their_layers() -> None:
    layout = KvLayout(layers=4, kv_heads=2, head_dim=2, block_size=4, dtype="float16")
    boxes = list(plan(placed(layout, 1, 1), placed(layout, 1, 2), 0, 4))
    assert [len(runs(box, placed(layout, 1, 1), placed(layout, 1, 2))) for box in boxes] == [1, 1]


def test_replicas_of_a_head_take_turns() -> None:
    layout = KvLayout(layers=1, kv_heads=1, head_dim=2, block_size=4, dtype="float16")
    boxes = plan(placed(layout, 4, 1), placed(layout, 4, 1), 0, 4)
    assert [(box.source, box.target) for box in boxes] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("wrong", [{"layers": 3}, {"kv_heads": 1}, {"head_dim": 4}, {"dtype": "float32"}])
def test_another_model_is_refused(wrong: dict[str, int | str]) -> None:
    layout = KvLayout(layers=4, kv_heads=2, head_dim=2, block_size=4, dtype="float16")
    error = difference(layout, msgspec.structs.replace(layout, **wrong))
    assert error is not None
    assert "cannot become KV of" in error.message
    assert difference(layout, msgspec.structs.replace(layout, block_size=8)) is None


def test_canonical_blocks_are_those_of_one_rank() -> None:
    layout = KvLayout(layers=2, kv_heads=2, head_dim=HEAD_DIM, block_size=4, dtype="float16")
    one = filled(placed(layout, 1, 1), 4)
    block = CanonicalBlocks.scratch(layout)
    copy(filled(placed(layout, 2, 2), 4), [0], block, [0], 0, 4)
    assert bytes(block.data) == bytes(one.blocks[0][0])
    assert canonical(layout).layout == layout
    block.clear()
    assert not any(block.data)
