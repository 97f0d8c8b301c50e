"""Times of a profile that tells more than the engine's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dssim.kernel import Kernel
from dssim.profiled import Nodes
from dssim.times import Linear, LinearTimes, beside, linear_times
from dstopology.load import load
from dswire.errors import BadInput
from support.topologies import Desk


def write(directory: Path, **document: Any) -> str:
    path = directory / "p.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_what_a_system_needs_beyond_the_engine_is_added_to_each_step(tmp_path: Path) -> None:
    fit = {
        "prefill": {"base_ms": 8, "per_token_ms": 1},
        "decode": {"base_ms": 10, "per_sequence_ms": 1},
        "decode_large": {"base_ms": 20},
        "large_batch": 3,
        "overhead": {"prefill": {"base_ms": 2}, "decode": {"base_ms": 1, "per_sequence_ms": 0.5}},
    }
    times = linear_times(write(tmp_path, tp={"1": fit}), 1)
    assert times.prefill_s([5]) == pytest.approx(0.015)
    assert times.decode_s([7, 7]) == pytest.approx(0.014)
    # the large fit had no share of a sequence of its own
    assert times.decode_s([7, 7, 7]) == pytest.approx(0.0225)


@pytest.mark.parametrize(
    "told", [[1], {"prefill": "x"}, {"prefill": 0.1}, {"decode": 11}, {"decode": float("nan")}]
)
def test_factors_that_are_none_are_refused(tmp_path: Path, told: Any) -> None:
    with pytest.raises(BadInput, match="beside"):
        beside(write(tmp_path, tp={}, beside=told))
    assert beside(write(tmp_path, tp={})) == {}


def test_a_step_is_slower_while_another_instance_of_the_node_is_in_one(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.model()
    topology = load(desk.write("model: tiny\n"), desk.env)
    prefill, decode = topology.instances
    kernel = Kernel()
    nodes = Nodes({"prefill": 1.5, "decode": 2.0}, kernel)
    alone = LinearTimes(Linear(1.0), Linear(0.1))
    reading, making = nodes.times(prefill, alone), nodes.times(decode, alone)
    assert reading.prefill_s([1]) == 1.0
    # it lies within the prompt's
    assert making.decode_s([1]) == pytest.approx(0.2)
    kernel.at(100.0, lambda: None)
    kernel.step()
    # nobody was in a step for long
    assert making.mixed_s([(0, 1)], [1]) == pytest.approx(1.0)
    assert Nodes({}).times(decode, alone) is alone


def test_what_a_neighbour_does_lately_is_what_it_is_taken_to_do(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.model()
    topology = load(desk.write("model: tiny\n"), desk.env)
    kernel = Kernel()
    nodes = Nodes({"prefill": 2.0}, kernel)
    reading, making = (
        nodes.times(one, times)
        for one, times in zip(
            topology.instances,
            (LinearTimes(Linear(1.0), Linear(1.0)), LinearTimes(Linear(1.0), Linear(0.1))),
            strict=True,
        )
    )
    called: list[float] = []
    # in a step for half of the time
    for number in range(100):
        kernel.at(0.2 * number, lambda: called.append(making.decode_s([1])))
        while kernel.step():
            pass
    kernel.at(20.0, lambda: None)
    kernel.step()
    assert reading.prefill_s([1]) == pytest.approx(1.0 + 0.5, abs=0.1)
