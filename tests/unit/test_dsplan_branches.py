"""Parts of a search in processes beside each other: none of them outlives an interrupt."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.process import BaseProcess

import pytest

from dsplan import branches
from dsplan.planner import Planner
from support.plans import question


def test_whoever_is_done_first_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(question())
    names = ("high", "low", "colocated")
    apart = branches.run(planner, names, 1)
    here: list[str] = []
    part = planner.part

    def noted(name: str) -> branches.Part:
        here.append(name)
        return part(name)

    monkeypatch.setattr(branches, "WORTHWHILE", 1)
    monkeypatch.setattr(planner, "part", noted)
    assert branches.run(planner, names, 2) == apart
    # a process takes longer to start than these take to be searched
    assert here[0] == "colocated"
    assert "high" not in here
    assert branches.run(planner, names, 9) == apart


def test_what_a_process_did_not_live_to_tell_is_searched_here(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(question())
    names = ("high", "low", "colocated")
    apart = branches.run(planner, names, 1)
    part = planner.part

    def killed_beside(name: str) -> branches.Part:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        return part(name)

    monkeypatch.setattr(branches, "WORTHWHILE", 1)
    monkeypatch.setattr(planner, "part", killed_beside)
    assert branches.run(planner, names, 2) == apart


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
