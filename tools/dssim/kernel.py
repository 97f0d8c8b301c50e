"""The virtual clock: a heap of what is to happen, in order of time, and of scheduling where times are equal.

Invariant: time never goes back. The order is a function of what was scheduled only, so a run is deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Kernel:
    """Time, in seconds from 0, and what is to happen in it."""

    def __init__(self) -> None:
        self.now = 0.0
        #: happenings so far
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call at ``when``, or now when that is past."""
        self._serial += 1
        heapq.heappush(self._heap, (max(when, self.now), self._serial, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call in ``seconds``."""
        self.at(self.now + seconds, call, *arguments)

    def step(self) -> bool:
        """Let the next thing happen; False when there is none."""
        if not self._heap:
            return False
        self.now, _, call, arguments = heapq.heappop(self._heap)
        self.steps += 1
        call(*arguments)
        return True
