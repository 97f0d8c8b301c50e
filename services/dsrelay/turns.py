"""Who may take part in a hand-off now, where each may take part in one at a time.

A hand-off takes its reader's turn, and then its owner's: whoever has both goes on, and nobody waits for a reader
while it has an owner, so no ring of them can wait for each other.
"""

from __future__ import annotations

from collections import deque

from dskv.handle import KvKey


class Turns:
    """Queues, first come first served, of the hand-offs of each participant."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[KvKey]] = {}

    def take(self, name: str, key: KvKey) -> bool:
        """Queue for ``name``; whether it is the turn of ``key`` at once."""
        queue = self._queues.setdefault(name, deque())
        queue.append(key)
        return queue[0] == key

    def give(self, name: str, key: KvKey) -> KvKey | None:
        """Leave the queue, from whichever place; the hand-off whose turn has come with that."""
        queue = self._queues.get(name)
        if queue is None or key not in queue:
            return None
        first = queue[0] == key
        queue.remove(key)
        if not queue:
            del self._queues[name]
            return None
        return queue[0] if first else None

    def has(self, name: str, key: KvKey) -> bool:
        """Whether it is the turn of ``key``."""
        queue = self._queues.get(name)
        return queue is not None and queue[0] == key

    @property
    def waiting(self) -> int:
        """Those that have a turn or wait for one."""
        return sum(map(len, self._queues.values()))
