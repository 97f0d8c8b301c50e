"""Who hands KV over to whom, where instances have stages on several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.topologies import Desk

NODES = "model: tiny\nnodes:\n" + "".join(
    f"- {{name: {name}, host: 10.0.0.{number}, devices: [{', '.join(f'cpu:{i}' for i in range(6))}]}}\n"
    for number, name in enumerate("abcd", 1)
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def placed(prefill: str, decode: str) -> str:
    return f"{NODES}prefill: {{{prefill}}}\ndecode: {{{decode}}}\n"


def test_stages_beside_each_other_are_a_run(desk: Desk) -> None:
    text = placed(
        "pp: 4, place: [[a/cpu:0, a/cpu:1, a/cpu:2, b/cpu:0]]",
        "pp: 4, place: [[a/cpu:3, a/cpu:4, a/cpu:5, b/cpu:1]]",
    )
    prefill, decode = desk.load(text).instances
    assert [(run.node, run.first, run.end) for run in prefill.runs] == [("a", 0, 3), ("b", 3, 4)]
    assert [prefill.run_of(rank).node for rank in range(4)] == ["a", "a", "a", "b"]
    assert prefill.hands_over_to(decode)


def test_pairs_reach_each_other_and_those_on_one_node_all_of_these(desk: Desk) -> None:
    text = placed(
        "pp: 2, place: [[a/cpu:0, b/cpu:0], [c/cpu:0, c/cpu:1], [d/cpu:0, d/cpu:1]]",
        "pp: 2, tp: 2, place: [[a/cpu:1, a/cpu:2, b/cpu:1, b/cpu:2], [c/cpu:2, c/cpu:3, c/cpu:4, c/cpu:5]]",
    )
    topology = desk.load(text)
    assert topology.reach == {
        "prefill-0": {"decode-0"},
        "prefill-1": {"decode-1"},
        "prefill-2": {"decode-1"},
    }
    # the relay of d serves that of c, and nothing goes to or from those of the pair
    assert {node: topology.sources_of(node) for node in "bcd"} == {"b": (), "c": ("d",), "d": ()}


@pytest.mark.parametrize(("layers", "wrong"), [(5, False), (6, True), (8, False)])
def test_each_node_must_have_the_same_layers_of_both(desk: Desk, layers: int, wrong: bool) -> None:
    desk.model(num_hidden_layers=layers)
    text = placed("pp: 4, place: [[a/cpu:0, a/cpu:1, b/cpu:0, b/cpu:1]]", "pp: 2, place: [[a/cpu:2, b/cpu:2]]")
    told = (
        "8: decode.pp: of 6 layers prefill-0 has those up to 4 on a, and decode-0 those up to 3: "
        "the KV of a layer is handed over within its node"
    )
    assert desk.problems(text) == [told] * wrong


def test_other_parts_of_the_model_on_the_same_nodes_are_no_pair(desk: Desk) -> None:
    text = placed("pp: 3, place: [[a/cpu:0, a/cpu:1, b/cpu:0]]", "pp: 3, place: [[a/cpu:2, b/cpu:1, b/cpu:2]]")
    assert [problem.split(",")[0] for problem in desk.problems(text)] == [
        "7: prefill.place: prefill-0 has of 3 stages 2 on a and 1 on b",
        "8: decode.place: decode-0 has of 3 stages 1 on a and 2 on b",
    ]
