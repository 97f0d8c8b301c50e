"""Systems that the servers can start: what is written of them, and what stands in for the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dsplan import report, startable
from dsplan.confirm import simulated
from dsplan.given import spec_of
from dsplan.goodput import Goodput
from dsplan.placement import Group, Plan, Spec
from dsplan.planner import Planner
from dsplan.search import Pair, Parallel
from dsplan.topology_file import document, dumped, text
from dstopology.load import load
from support.plans import question


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Planner(question()).run()


def test_a_choice_over_several_nodes_names_the_best_that_the_servers_can_start(plan: Plan) -> None:
    one = Group(Parallel(2, 2), 1)
    wide = dataclasses.replace(plan.question, nodes=2, devices_per_node=2, algorithm="high")
    spread = dataclasses.replace(plan.chosen, spec=Spec("high", one, one), goodput=Goodput(99.0, 99.0, 99.0))
    told = dataclasses.replace(plan, question=wide, chosen=spread, notes=[])
    startable.tell(told)
    assert told.startable is not None
    assert max(group.parallel.devices for group in (told.startable.spec.prefill, told.startable.spec.decode)) <= 2
    assert f"the best that they can is {told.startable.spec}" in told.notes[0]
    assert report.data(told)["startable"]["prefill"]["replicas"] == told.startable.spec.prefill.replicas
    assert text(told, told.startable)
    startable.tell(plan)
    assert plan.startable is None
    # no better than what can be started: that is the choice then
    worse = dataclasses.replace(spread, goodput=Goodput(0.1, 0.1, 0.1))
    told = dataclasses.replace(plan, question=wide, chosen=worse, placements=[worse], notes=[])
    startable.tell(told)
    assert (told.placements, told.startable, told.notes) == ([told.chosen, worse], None, [])


def test_stages_side_by_side_are_written_and_can_be_served(plan: Plan, tmp_path: Path) -> None:
    wide = dataclasses.replace(plan.question, nodes=2, devices_per_node=6)
    spec = Spec("low", Group(Parallel(2, 2), 1), Group(Parallel(1, 2), 2), stages=2)
    content = document(wide, spec)
    assert content["prefill"]["place"] == [["n0/cuda:0", "n0/cuda:1", "n1/cuda:0", "n1/cuda:1"]]
    assert content["decode"]["place"] == [["n0/cuda:2", "n1/cuda:2"], ["n0/cuda:3", "n1/cuda:3"]]
    assert "node_affinity" not in content["router"]
    (path := tmp_path / "t.yaml").write_text(dumped(content))
    topology = load(path, {"DS_RUN_DIR": str(tmp_path), "DS_SHM_DIR": str(tmp_path), "DS_HOME": str(tmp_path)})
    assert {one.stage_nodes for one in topology.instances} == {("n0", "n1")}
    assert not topology.between_gpus
    # there is no room for more on these nodes, and others' KV would have to come from them
    assert not startable.startable(wide, dataclasses.replace(spec, decode=Group(Parallel(1, 2), 5)))
    assert startable.startable(wide, dataclasses.replace(spec, mode="conditional"))


def test_pairs_side_by_side_are_on_as_many_groups_of_nodes_as_it_takes(plan: Plan, tmp_path: Path) -> None:
    wide = dataclasses.replace(plan.question, nodes=4, devices_per_node=3)
    three = Spec("low", Group(Parallel(1, 2), 3), Group(Parallel(1, 2), 3), stages=2)
    assert startable.islands(three, 3) == [(1, 1)] * 3
    assert not startable.startable(wide, three)
    assert startable.islands(three, 4) == [(2, 2), (1, 1)]
    spec = dataclasses.replace(three, prefill=Group(Parallel(1, 2), 2), decode=Group(Parallel(2, 2), 2))
    assert not startable.startable(wide, dataclasses.replace(spec, decode=Group(Parallel(2, 2), 3)))
    content = document(wide, spec)
    assert content["prefill"]["place"] == [["n0/cuda:0", "n1/cuda:0"], ["n2/cuda:0", "n3/cuda:0"]]
    assert content["decode"]["place"][1] == ["n2/cuda:1", "n2/cuda:2", "n3/cuda:1", "n3/cuda:2"]
    (path := tmp_path / "t.yaml").write_text(dumped(content))
    topology = load(path, {"DS_RUN_DIR": str(tmp_path), "DS_SHM_DIR": str(tmp_path), "DS_HOME": str(tmp_path)})
    assert topology.reach == {f"prefill-{n}": {f"decode-{n}"} for n in range(2)}
    assert spec_of(topology) == spec
    assert topology.sources_of("n1") == topology.sources_of("n3") == ()
    _, run, _ = simulated(wide, spec, 2.0, 40, 40)
    assert all(not record.error for record in run.records)


def test_a_plan_of_what_can_be_started_has_stages_of_the_same_layers(plan: Plan) -> None:
    wide = dataclasses.replace(plan.question, nodes=2, devices_per_node=2, algorithm="low", startable=True)
    found = Planner(wide)._search_low()
    pairs = [one.what for one in found.tried if isinstance(one.what, Pair)]
    assert {one.stages for one in pairs} == {1, 2}
    assert all(one.alike(wide.shape.layers) for one in pairs if one.stages == 2)


def test_colocated_instances_over_several_nodes_are_written_stage_by_stage(plan: Plan) -> None:
    def spread(tp: int, pp: int, replicas: int) -> Spec:
        none, each = Group(Parallel(tp, pp), 0), Group(Parallel(tp, pp), replicas)
        return Spec("", none, each, mode="colocated", budget=512)

    wide = dataclasses.replace(plan.question, nodes=3, devices_per_node=4)
    places = document(wide, spread(2, 3, 2))["decode"]["place"]
    assert [[place.replace("cuda:", "") for place in one] for one in places] == [
        ["n0/0", "n0/1", "n0/2", "n0/3", "n1/0", "n1/1"],
        ["n1/2", "n1/3", "n2/0", "n2/1", "n2/2", "n2/3"],
    ]
    # three devices of a stage leave one of each node
    assert startable.startable(wide, spread(3, 3, 1))
    assert not startable.startable(wide, spread(3, 4, 1))
    assert not startable.startable(wide, spread(2, 3, 3))
    told = dataclasses.replace(plan, question=wide, chosen=dataclasses.replace(plan.chosen, spec=spread(2, 3, 2)))
    startable.tell(told)
    assert told.startable is None
