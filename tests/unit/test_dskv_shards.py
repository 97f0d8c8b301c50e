"""Ranks share layers and KV heads out evenly."""

from __future__ import annotations

import pytest

from dskv.layout import KvLayout
from dskv.shards import head_ranges, shards, stage_layers
from dswire.errors import UnsupportedModel

LAYOUT = KvLayout(layers=5, kv_heads=6, head_dim=4, block_size=2, dtype="float32")


def test_ranks_are_stage_major_and_the_first_stages_take_what_is_over() -> None:
    made = shards(LAYOUT, 2, 2, ["a", "b", "c", "d"])
    assert [(one.segment, one.first_layer, one.end_layer, one.first_head, one.end_head) for one in made] == [
        ("a", 0, 3, 0, 3),
        ("b", 0, 3, 3, 6),
        ("c", 3, 5, 0, 3),
        ("d", 3, 5, 3, 6),
    ]
    assert sum(one.layout(LAYOUT).block_nbytes for one in made) == LAYOUT.block_nbytes


def test_few_kv_heads_are_held_by_neighbouring_ranks() -> None:
    assert head_ranges(2, 4) == ((0, 1), (0, 1), (1, 2), (1, 2))


@pytest.mark.parametrize("tp", [0, 4, 9])
def test_heads_that_cannot_be_shared_evenly_are_refused(tp: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot be shared by tp {tp}"):
        head_ranges(6, tp)


@pytest.mark.parametrize("pp", [0, 6])
def test_more_stages_than_layers_are_refused(pp: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot make {pp} stages"):
        stage_layers(5, pp)
