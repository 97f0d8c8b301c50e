"""Memory, Algorithms 1 and 2, bounds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplan.devices import Device, find_device
from dsplan.errors import DoesNotFit
from dsplan.memory import BLOCK_TOKENS, fitting, memory
from dsplan.search import (
    Pair,
    Parallel,
    Tried,
    algorithm1,
    algorithm2,
    best_of,
    fill,
    fill_kinds,
    pairs_of,
    pruned,
    replicas,
    space,
)
from dsplan.shapes import ModelShape, find_model

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "gpu"
A100 = find_device("a100-80g")


def distserve_kv_tokens(shape: ModelShape, device: Device, tp: int, pp: int) -> int:
    """KV capacity as DistServe's ``profile_memory.py`` counts it: every rank has all of the embeddings."""
    layers = shape.layers * shape.layer_weights / (tp * pp)
    weights = (layers + shape.vocab * shape.hidden) * shape.item_nbytes
    block = shape.kv_token_nbytes * BLOCK_TOKENS / (tp * pp)
    return int((device.memory_nbytes * 0.94 - weights) // block) * BLOCK_TOKENS


def test_shapes_give_the_kv_capacity_in_rows_of_distserves_table() -> None:
    for model, tp, pp, tokens in (
        ("OPT-13B", 1, 1, 66_144),
        ("OPT-13B", 2, 1, 163_008),
        ("OPT-13B", 4, 1, 356_736),
        ("OPT-66B", 2, 1, 11_600),
        ("OPT-66B", 8, 1, 212_304),
        ("OPT-175B", 3, 3, 76_192),
    ):
        assert distserve_kv_tokens(find_model(model), A100, tp, pp) == pytest.approx(tokens, rel=0.004)


def test_shapes_give_the_kv_capacity_in_every_row_of_distserves_table() -> None:
    table = MEASURED / "distserve" / "max_num_tokens.csv"
    if not table.exists():
        pytest.skip("DistServe's table is not on this host")
    for row in csv.DictReader(table.read_text().splitlines()):
        shape, tp, pp = find_model(row["model"]), int(row["tp"]), int(row["pp"])
        expected = int(row["max_num_tokens"])
        assert distserve_kv_tokens(shape, A100, tp, pp) == pytest.approx(expected, rel=0.004)


def test_memory_counts_weights_activations_and_kv() -> None:
    shape = find_model("Llama-3-70B")
    one, eight = memory(shape, A100, 1, 1), memory(shape, A100, 8, 1)
    assert one.kv_tokens == 0
    assert eight.weights_nbytes == pytest.approx(shape.weights_nbytes / 8, rel=0.01)
    used = eight.weights_nbytes + eight.activations_nbytes + eight.kv_tokens * shape.kv_token_nbytes // 8
    assert used < A100.memory_nbytes


def test_a_model_that_fits_nowhere_is_told_with_numbers() -> None:
    with pytest.raises(DoesNotFit, match="325 GiB of weights"):
        fitting(find_model("OPT-175B"), A100, [(1, 1), (2, 1)], 2048)


def test_the_space_is_the_loops_of_algorithm_1() -> None:
    assert {(one.tp, one.pp) for one in space(1, 2)} == {(1, 1), (1, 2), (2, 1)}
    assert Parallel(8, 4) in space(4, 8)
    assert all(one.devices <= 32 for one in space(4, 8))


rates = st.dictionaries(st.sampled_from(space(2, 4)), st.floats(0, 100), min_size=1)


@given(prefill=rates, decode=rates, slack=st.floats(1, 3))
def test_algorithm_1_finds_the_most_goodput_per_device_pruned_or_not(
    prefill: dict[Parallel, float], decode: dict[Parallel, float], slack: float
) -> None:
    found = algorithm1(
        space(2, 4),
        lambda one: prefill.get(one, 0.0),
        lambda one: decode.get(one, 0.0),
        lambda one: prefill.get(one, 0.0) * slack,
        lambda one: decode.get(one, 0.0) * slack,
    )
    for best, table in ((found.prefill, prefill), (found.decode, decode)):
        most = max(rate / one.devices for one, rate in table.items())
        assert (best.per_device if best is not None else 0.0) == most


@given(st.lists(st.floats(0, 100), min_size=12, max_size=12), st.floats(1, 2))
def test_algorithm_2_finds_the_same_with_bounds(drawn: list[float], slack: float) -> None:
    pairs = pairs_of(2, 4, lambda one: one.tp <= 2 and one.pp <= 2)
    table = dict(zip(pairs, drawn * len(pairs), strict=False))
    plain = algorithm2(pairs, table.__getitem__)
    pruned = algorithm2(pairs, table.__getitem__, [lambda pair: table[pair] * slack])
    assert (plain.best is None) == (pruned.best is None)
    if plain.best is not None and pruned.best is not None:
        assert pruned.best.per_device == plain.best.per_device == max(r / p.devices for p, r in table.items())


def test_pairs_stay_in_a_node_and_count_all_stages() -> None:
    pairs = pairs_of(2, 4, lambda one: True)
    assert all(pair.prefill.devices + pair.decode.devices <= 4 for pair in pairs)
    pair = Pair(2, Parallel(2, 1), Parallel(1, 2))
    assert pair in pairs
    assert (pair.devices, pair.whole_prefill, pair.whole_decode) == (8, Parallel(2, 2), Parallel(1, 4))


def test_replicas_are_rounded_up() -> None:
    assert [replicas(rate, 2.0) for rate in (0.1, 2.0, 2.1, 6.0)] == [1, 1, 2, 3]


def test_filling_a_cluster_balances_the_phases() -> None:
    prefill, decode = Tried(Parallel(2, 1), 5.6), Tried(Parallel(1, 1), 10.0)
    filled = fill([prefill], [decode], 5)
    assert filled == (prefill, 2, decode, 1)
    assert fill([prefill], [decode], 2) is None


def test_two_kinds_of_devices_are_filled_each_with_its_phase() -> None:
    prefill, decode = Tried(Parallel(2, 1), 5.0), Tried(Parallel(1, 1), 4.0)
    assert fill_kinds([prefill], [decode], 4) == (prefill, 2, decode, 3)
    assert fill_kinds([prefill], [decode], 1) is None


@given(st.lists(st.floats(0, 100), min_size=8, max_size=8), st.floats(1, 2))
def test_asking_only_whether_a_rate_is_reached_finds_the_same(drawn: list[float], slack: float) -> None:
    table = dict(zip(space(1, 4), drawn, strict=True))
    asked: list[Parallel] = []

    def exact(one: Parallel) -> float:
        asked.append(one)
        return table[one]

    found = pruned(list(table), exact, (lambda one: table[one] * slack,), lambda one, rate: table[one] > rate)
    best = best_of(found)
    assert (best.per_device if best else 0.0) == max(rate / one.devices for one, rate in table.items())
    assert len(asked) == sum(one.exact for one in found) <= len(table)
