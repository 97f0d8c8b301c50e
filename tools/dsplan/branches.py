"""The searches of one question beside each other, each in a process of its own.

They share nothing but what has been found once, so that apart they find the same as together, some of it twice. The
last, which tends to be the longest, stays in this process and tells its progress; whoever is done takes the next.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsplan.placement import Placement
from dsplan.question import Question
from dsplan.search import High, Low, Tried

if TYPE_CHECKING:
    from dsplan.planner import Planner

#: parallelisms below which a search takes no longer than a process takes to start
WORTHWHILE = 6


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
        shared, own = _Shared(names, pool, planner.question), {}
        try:
            for _ in range(beside):
                shared.submit()
            while (name := shared.take()) is not None:
                own[name] = planner.part(name)
            return [own[name] if name in own else shared.result(name) or planner.part(name) for name in names]
        except BaseException:
            # Ctrl-C too: nobody waits for the other parts, of which each process would go on with its next one
            shared.take_all()
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


class _Shared:
    """Names that nobody has begun with. Processes take the first ones, this one the last."""

    def __init__(self, names: Sequence[str], pool: ProcessPoolExecutor, question: Question) -> None:
        self.submitted: dict[str, Future[Part]] = {}
        self._left = deque(names)
        self._pool = pool
        self._question = question
        self._lock = threading.Lock()

    def submit(self, done: Future[Part] | None = None) -> None:
        """Have a process begin with the next; when it has ended, it gets another."""
        with self._lock:
            # the last one is begun here
            if len(self._left) < (1 if done else 2) or (done and done.exception()):
                return
            name = self._left.popleft()
            self.submitted[name] = future = self._pool.submit(_part, self._question, name)
        future.add_done_callback(self.submit)

    def take(self) -> str | None:
        """The next for this process."""
        with self._lock:
            return self._left.pop() if self._left else None

    def result(self, name: str) -> Part | None:
        """Of what was submitted; None where the process did not live to tell it. Raises what the search raised."""
        try:
            return self.submitted[name].result()
        except BrokenProcessPool:
            return None

    def take_all(self) -> None:
        """Nobody begins with any more."""
        with self._lock:
            self._left.clear()


def _part(question: Question, name: str) -> Part:
    from dsplan.planner import Planner

    return Planner(question).part(name)
