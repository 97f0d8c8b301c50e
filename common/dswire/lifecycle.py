"""A life cycle: a transition table and the story of one thing that lives by it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

PhaseT = TypeVar("PhaseT", bound=Enum)

#: steps kept of each story
STORY_STEPS = 32


class IllegalTransition(RuntimeError):
    """A step that the table does not name: a bug. Carries the story of the thing concerned."""


class Lifecycle(Generic[PhaseT]):
    """Where one thing stands, and how it came there."""

    __slots__ = ("_name", "_table", "phase", "since", "story")

    def __init__(self, name: str, table: Mapping[PhaseT, frozenset[PhaseT]], start: PhaseT, now: float) -> None:
        self._name = name
        self._table = table
        self.phase = start
        #: time of the last step
        self.since = now
        #: the last steps: (time, phase reached, why)
        self.story: deque[tuple[float, PhaseT, str]] = deque([(now, start, "new")], maxlen=STORY_STEPS)

    def move(self, to: PhaseT, now: float, why: str) -> float:
        """Step to ``to``; returns the seconds spent in the phase left. Raises :class:`IllegalTransition`."""
        if to not in self._table[self.phase]:
            raise IllegalTransition(f"{self._name}: {self.phase.name} -> {to.name} ({why}); {self.tell()}")
        spent = now - self.since
        self.phase, self.since = to, now
        self.story.append((now, to, why))
        return spent

    def tell(self) -> str:
        """The story in one line, times in milliseconds since its first step."""
        start = self.story[0][0]
        steps = (f"{(at - start) * 1e3:.1f}ms {phase.name} ({why})" for at, phase, why in self.story)
        return "story: " + " -> ".join(steps)
