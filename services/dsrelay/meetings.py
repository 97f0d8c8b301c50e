"""Where KV goes by communicators: owners of this node meet the readers of others, once each, to try them.

Invariant: whoever comes later, an owner or a reader, is tried with all who are there, and again after a restart.
Pure.
"""

from __future__ import annotations

from dsrelay.events import WORKER, Action
from dsrelay.registry import MAX_PEERS
from dswire.machine import Send
from dswire.messages import kv


class Meetings:
    """Who wants to meet the owners of this node."""

    def __init__(self, out: list[Action]) -> None:
        #: as peers
        self._owners: dict[str, None] = {}
        #: a relay, and a reader of its node
        self._wanted: dict[tuple[str, str], None] = {}
        self._out = out

    def want(self, peer: str, reader: str) -> None:
        """A relay asks for a meeting of each owner with ``reader``."""
        if len(self._wanted) < MAX_PEERS:
            self._wanted[peer, reader] = None
        self._out += [Send(owner, kv.KvMeet(reader, peer)) for owner in self._owners]

    def welcome(self, owner: str) -> None:
        """An owner has said hello."""
        self._owners[owner] = None
        self._out += [Send(owner, kv.KvMeet(reader, peer)) for peer, reader in self._wanted]

    def answered(self, owner: str, told: kv.KvMeeting) -> None:
        """Where it is met. An answer that nobody asked for goes nowhere."""
        if (told.by, told.reader) in self._wanted and owner in self._owners:
            name = owner.removeprefix(WORKER)
            self._out.append(Send(told.by, kv.KvMet(name, told.reader, told.meeting, told.error)))

    def forget(self, peer: str) -> None:
        """An owner or a relay is gone, or was started again."""
        self._owners.pop(peer, None)
        for one in [one for one in self._wanted if one[0] == peer]:
            del self._wanted[one]
