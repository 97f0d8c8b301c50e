"""Parts of a search in processes beside each other: none of them outlives an interrupt."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.process import BaseProcess

import pytest

from dsplan import branches
from dsplan.planner import Planner
from support.plans import question


def test_an_interrupted_search_ends_the_processes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(question())
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
