"""Named deadlines of a machine, earliest first, in O(log n)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

NameT = TypeVar("NameT", bound=Hashable)

#: entries that may be no deadline any more, beside as many as there are deadlines
_SPARE = 64


class Timers(Generic[NameT]):
    """At most one deadline for each name."""

    def __init__(self) -> None:
        self._at: dict[NameT, float] = {}
        #: may hold entries that were moved or cancelled; ``_at`` is the truth
        self._heap: list[tuple[float, int, NameT]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, name: NameT) -> bool:
        return name in self._at

    def set(self, name: NameT, at: float) -> None:
        """Set or move a deadline."""
        self._at[name] = at
        self._serial += 1
        heapq.heappush(self._heap, (at, self._serial, name))
        if len(self._heap) > 2 * len(self._at) + _SPARE:
            # deadlines are far away, and most are cancelled long before
            self._heap = [(when, serial, one) for serial, (one, when) in enumerate(self._at.items())]
            heapq.heapify(self._heap)

    def cancel(self, name: NameT) -> None:
        """Forget a deadline; an unknown one is no error."""
        self._at.pop(name, None)

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[NameT]:
        """Remove and yield the names whose deadline has come, in order.

        One at a time: a deadline that is cancelled while an earlier one is dealt with does not come up.
        """
        while (at := self.next()) is not None and at <= now:
            name = heapq.heappop(self._heap)[2]
            del self._at[name]
            yield name
