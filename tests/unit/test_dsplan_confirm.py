"""The choice of a plan, made by the simulator."""

from __future__ import annotations

import dataclasses

import pytest

from dsplan import report
from dsplan.confirm import MOST_SYSTEMS, agreed, checked, confirm, confirmations, settled
from dsplan.goodput import Goodput
from dsplan.placement import Group, Placement, Plan, Spec
from dsplan.planner import Planner
from dsplan.reasons import verdict
from dsplan.search import Parallel
from support.plans import question

#: requests of a run where there is no compiler
FEW = 60


@pytest.fixture(scope="module")
def searched() -> tuple[Planner, Plan]:
    planner = Planner(question(devices_per_node=4, modes=("disaggregated", "colocated", "conditional")))
    return planner, planner.run()


@pytest.fixture
def plan(searched: tuple[Planner, Plan]) -> Plan:
    """Of its own lists."""
    _, found = searched
    return dataclasses.replace(found, placements=list(found.placements), notes=list(found.notes))


def hoped(one: Placement, times: float) -> Placement:
    """As if the search hoped for so many times as much."""
    told = one.goodput
    return dataclasses.replace(one, goodput=Goodput(told.rate * times, told.low * times, told.high * times))


def of(plan: Plan, mode: str) -> Placement:
    return next(one for one in plan.placements if one.spec.mode == mode)


def test_it_finds_the_highest_rate_that_attains(plan: Plan) -> None:
    one = of(plan, "disaggregated")
    assert confirm(plan, FEW, one.goodput.rate / 2, one).attainment >= 0.9
    optimistic = hoped(one, 2.0)
    runs = confirmations(plan, FEW, optimistic)
    found = agreed(plan, runs)
    assert len(runs) > 1
    assert found.attainment >= 0.9 > runs[0].attainment
    assert all(run.rate <= found.rate for run in runs if run.attainment >= 0.9)
    told = settled(plan, optimistic, FEW)
    assert told.simulated
    assert (told.goodput.rate, told.goodput.high) == (found.rate, optimistic.goodput.high)
    assert told.goodput.low <= told.goodput.rate


def test_what_it_agrees_to_stays_as_it_is(searched: tuple[Planner, Plan], plan: Plan) -> None:
    modest = hoped(of(plan, "colocated"), 0.5)
    plan = dataclasses.replace(plan, chosen=modest, placements=[modest], mixed=())
    (run,) = checked(searched[0], plan, FEW)
    assert run.attainment >= 0.9
    assert plan.chosen == dataclasses.replace(modest, simulated=True)
    assert plan.placements[0] is plan.chosen
    assert report.data(plan)["placements"][0]["simulated"]


def test_whom_the_search_hoped_too_much_for_is_not_chosen(searched: tuple[Planner, Plan], plan: Plan) -> None:
    together, apart = of(plan, "colocated"), hoped(of(plan, "disaggregated"), 3.0)
    plan = dataclasses.replace(plan, chosen=apart, placements=[apart, together])
    assert verdict(plan).startswith("Disaggregate")
    runs = checked(searched[0], plan, FEW)
    assert [run.mode for run in runs] == ["colocated", "disaggregated"]
    assert plan.chosen.spec == together.spec
    assert plan.chosen.worth > of(plan, "disaggregated").worth
    assert all(one.simulated for one in plan.placements)
    assert plan.notes[-1].startswith(f"the search had put {apart.spec} first")
    assert verdict(plan).startswith("Do not disaggregate")
    # for 99 %, it is that of the new choice
    assert plan.strict.rate <= plan.chosen.goodput.rate


def test_the_next_instance_of_mode_colocated_takes_part(searched: tuple[Planner, Plan], plan: Plan) -> None:
    best = of(plan, "colocated")
    worse = dataclasses.replace(best.spec, decode=Group(Parallel(1, 2), 2))
    hopeful = dataclasses.replace(hoped(best, 3.0), spec=worse)
    plan = dataclasses.replace(plan, chosen=hopeful, placements=[hopeful])
    checked(searched[0], plan, FEW)
    assert len(plan.placements) > 1
    assert plan.chosen.spec != worse
    assert plan.chosen.simulated


def test_what_no_topology_can_say_is_noted(searched: tuple[Planner, Plan], plan: Plan) -> None:
    spread = Spec("high", Group(Parallel(8, 1), 1), Group(Parallel(1, 1), 1))
    chosen = dataclasses.replace(plan.chosen, spec=spread)
    plan = dataclasses.replace(plan, chosen=chosen, placements=[chosen])
    assert checked(searched[0], plan, 10) == []
    assert "have stages on several nodes" in plan.notes[-1]
    assert plan.chosen is chosen
    # a rival that cannot be simulated is not chosen for what is hoped of it
    rival, own = hoped(chosen, 0.9), of(searched[1], "colocated")
    plan = dataclasses.replace(plan, chosen=own, placements=[own, rival])
    checked(searched[0], plan, FEW)
    assert plan.chosen.spec == own.spec


def test_it_ends(searched: tuple[Planner, Plan], plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Spec] = []

    def hopeless(plan: Plan, requests: int, one: Placement) -> list[object]:
        asked.append(one.spec)
        return [dataclasses.replace(run, attainment=0.0)]

    run = confirm(plan, FEW, 1.0, of(plan, "colocated"))
    monkeypatch.setattr("dsplan.confirm.confirmations", hopeless)
    checked(searched[0], plan, FEW)
    assert len(asked) == len(set(asked)) <= MOST_SYSTEMS
