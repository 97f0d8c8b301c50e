"""Parts of a search in processes beside each other: none of them outlives an interrupt."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.process import BaseProcess

import pytest

from dsplan import branches
from dsplan.devices import find_device
from dsplan.goodput import Slo, make_workload
from dsplan.linear import distserve_latency
from dsplan.planner import Planner
from dsplan.question import Question
from dsplan.shapes import find_model

QUESTION = Question(
    shape=find_model("OPT-13B"),
    device=find_device("a100-80g"),
    latency=distserve_latency("OPT-13B", "a100-80g"),
    nodes=1,
    devices_per_node=3,
    workload=make_workload("sharegpt", 2000),
    slo=Slo(0.25, 0.1),
    modes=("disaggregated",),
)


def test_an_interrupted_search_ends_the_processes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(QUESTION)
    before = set(multiprocessing.active_children())
    beside: list[BaseProcess] = []

    def interrupted(name: str) -> None:
        beside.extend(set(multiprocessing.active_children()) - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(branches, "WORTHWHILE", 1)
    monkeypatch.setattr(planner, "part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        branches.run(planner, ("high", "low"), 2)
    assert [process.exitcode for process in beside] == [-signal.SIGTERM]
