"""A clock that jumps from one scheduled call to the next. Calls of the same time run in the order of scheduling."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class VirtualClock:
    """Time, and what is to happen in it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call at ``when``, or now when that is past."""
        self._serial += 1
        heapq.heappush(self._heap, (max(when, self.now), self._serial, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call in ``seconds``."""
        self.at(self.now + seconds, call)

    def step(self, until: float) -> bool:
        """Run the next call; False, with the time set to ``until``, when none is due by then."""
        if not self._heap or self._heap[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, call = heapq.heappop(self._heap)
        call()
        return True
