"""The searches of one question beside each other, each in a process of its own.

They share nothing but what has been found once, so that apart they find the same as together, some of it twice. The
last, which tends to be the longest, stays in this process and tells its progress.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsplan.placement import Placement
from dsplan.question import Question
from dsplan.search import High, Low, Tried

if TYPE_CHECKING:
    from dsplan.planner import Planner

#: parallelisms below which a search takes no longer than a process takes to start
WORTHWHILE = 8


@dataclass(slots=True)
class Part:
    """What one search found."""

    high: High | None = None
    low: Low | None = None
    mixed: tuple[Tried, ...] = ()
    own: list[Placement] = field(default_factory=list)
    #: systems of mode conditional that are made of :attr:`own`
    derived: list[Placement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(planner: Planner, names: Sequence[str], processes: int) -> list[Part]:
    """A part for each name, in their order."""
    beside = min(processes, len(names)) - 1
    if beside < 1 or len(planner.allowed[0]) < WORTHWHILE:
        return [planner.part(name) for name in names]
    before = set(multiprocessing.active_children())
    # not forked: the bar of a terminal is drawn by a thread
    with ProcessPoolExecutor(beside, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            others = [pool.submit(_part, planner.question, name) for name in names[:-1]]
            last = planner.part(names[-1])
            return [*(other.result() for other in others), last]
        except BaseException:
            # Ctrl-C too: nobody waits for the other parts, of which each process would go on with its next one
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _part(question: Question, name: str) -> Part:
    from dsplan.planner import Planner

    return Planner(question).part(name)
