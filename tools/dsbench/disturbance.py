"""What a machine did beside a measurement: time that its host took away, and other processes' work.

All from ``/proc``, and of the whole machine, so in a container too. Steal is time that a virtual core was ready to
run in and was not let; others' work is what the cores did in user and system mode, less what the watched processes
and all their children did. Both are shares of all cores' time. Interrupts are counted as nobody's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
#: of the times in ``/proc``, which count in ticks
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Shares of all cores' time while something was measured."""

    steal: float
    others: float
    #: share of the time in which something that could have run waited for a core, the watched processes included;
    #: None where the kernel does not tell
    waiting: float | None

    @property
    def share(self) -> float:
        """Of the machine that was not there for the measurement."""
        return self.steal + self.others


class _Look(NamedTuple):
    """Seconds of all cores, since the machine began."""

    steal_s: float
    work_s: float
    #: of the watched processes
    ours_s: float
    #: on the wall, in which something waited
    waited_s: float | None


class Watch:
    """From its making to :meth:`end`, beside processes that begin before it and live on after it."""

    def __init__(self, roots: Iterable[int], proc: Path = PROC) -> None:
        """``roots``: processes that are no disturbance, nor are their children."""
        self._roots, self._proc = tuple(roots), proc
        self._began_s = time.monotonic()
        self._began = self._look()

    def end(self) -> Disturbance:
        """What was seen."""
        wall_s = max(time.monotonic() - self._began_s, TICK_S)
        then, now = self._began, self._look()
        whole_s = wall_s * self._cores()
        others_s = (now.work_s - then.work_s) - (now.ours_s - then.ours_s)
        waiting = None
        if now.waited_s is not None and then.waited_s is not None:
            waiting = min((now.waited_s - then.waited_s) / wall_s, 1.0)
        # the counts are not of quite the same moment, so that a little less than nothing may come out
        return Disturbance((now.steal_s - then.steal_s) / whole_s, max(others_s / whole_s, 0.0), waiting)

    def _cores(self) -> int:
        lines = (self._proc / "stat").read_text().splitlines()
        return sum(line.startswith("cpu") for line in lines) - 1

    def _look(self) -> _Look:
        whole = (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, _, _, steal = (int(ticks) * TICK_S for ticks in whole[:8])
        return _Look(steal, user + nice + system, self._work_s(), self._waited_s())

    def _work_s(self) -> float:
        parents: dict[int, int] = {}
        work_s: dict[int, float] = {}
        for path in self._proc.glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                # it has ended meanwhile
                continue
            pid = int(path.parent.name)
            parents[pid], work_s[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) * TICK_S
        return sum(seconds for pid, seconds in work_s.items() if self._mine(pid, parents))

    def _mine(self, pid: int, parents: dict[int, int]) -> bool:
        while pid and pid not in self._roots:
            pid = parents.get(pid, 0)
        return pid != 0

    def _waited_s(self) -> float | None:
        try:
            some = (self._proc / "pressure/cpu").read_text().split("\n", 1)[0]
            return int(some.rpartition("total=")[2]) / 1e6
        except (OSError, ValueError):
            return None
