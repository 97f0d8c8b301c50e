"""Choices that wait for an instance. Pure.

KV of stages on several nodes is handed over within these, so it reaches the decode instances there and no others.
Choices whose KV can go to the same ones wait in one queue, so that nobody waits for room that is not for him.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from dsrouter.workers import Among, Workers


class Waiting:
    """The queues, by sequence id, first come first served."""

    def __init__(self, workers: Workers, reach: Mapping[str, frozenset[str]]) -> None:
        """``reach``: as in :class:`~dsrouter.config.RouterConfig`."""
        self._workers = workers
        self._reach = reach
        #: for a prefill instance, and for a decode instance that reads their prompts
        self.queued: deque[str] = deque()
        self.local: deque[str] = deque()
        #: for one that is handed their KV: one of these names
        self.placing: dict[Among, deque[str]] = {self.reached_from(name): deque() for name in (None, *reach)}

    def reached_from(self, prefill: str | None) -> Among:
        """The decode instances that can be handed the KV of a prefill instance, or what a relay kept."""
        return self._reach.get(prefill) if prefill is not None else None

    def behind(self, prefill: str | None) -> deque[str]:
        """The queue of KV that lies at that instance."""
        return self.placing[self.reached_from(prefill)]

    def everything(self) -> Iterator[tuple[str, Among, deque[str]]]:
        """Each queue, with the role that it waits for, and which of those."""
        yield "prefill", None, self.queued
        yield "decode", None, self.local
        for among, queue in self.placing.items():
            yield "decode", among, queue

    def remove(self, sequence: str) -> None:
        """It waits no longer; one that does not wait is no error."""
        for _, _, queue in self.everything():
            if sequence in queue:
                queue.remove(sequence)

    def leading(self) -> Among:
        """The prefill instances that are up and whose KV has somewhere to go, if it can be without waiting there;
        None for any, also where none has."""
        if not self._reach:
            return None
        up = {one.hello.name for one in self._workers.sharing("decode")}
        names = [one.hello.name for one in self._workers.sharing("prefill")]
        leading = [name for name in names if self._reach[name] & up]
        return frozenset([name for name in leading if not self.behind(name)] or leading) or None

    def stranded(self) -> list[str]:
        """Those whose decode instances are all down, while prompts can be read for others."""
        if self.leading() is None:
            return []
        return [
            sequence
            for among, queue in self.placing.items()
            if queue and not self._workers.sharing("decode", among)
            for sequence in queue
        ]

    def validate(self, sequence: str, *, queued: bool, placing: bool) -> None:
        """It waits once, where its phase says."""
        here = [role for role, _, queue in (*self.everything(),)[:2] if sequence in queue]
        assert len(here) == queued
        assert sum(sequence in queue for queue in self.placing.values()) == placing
