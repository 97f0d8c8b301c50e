"""The two connections of a prefill or decode instance: to the router, and to the relay of its node.

Pure. It answers pings and hellos and tells the machine when one of the two was lost, which is when the other
side says ``HelloWanted`` (it was restarted) or was silent for its lease.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec

from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.membership import Membership
from dswire.messages import kv, worker

ROUTER = "router"
RELAY = "relay"
#: a relay pings every second; silent for this long, in seconds, it is lost
RELAY_SILENCE_S = 5.0


class Link(Enum):
    """What happened to the connections."""

    ROUTER_JOINED = 0
    #: the router has forgotten every sequence
    ROUTER_LOST = 1
    #: the relay knows no handle of ours
    RELAY_JOINED = 2
    RELAY_LOST = 3


class Links:
    """Both memberships of one instance."""

    def __init__(
        self,
        router_hello: Callable[[], msgspec.Struct],
        relay_hello: Callable[[], msgspec.Struct],
        load: Callable[[], worker.Load],
    ) -> None:
        self.router = Membership(ROUTER, router_hello)
        self.relay = Membership(RELAY, relay_hello)
        #: the relay's welcome, once it came: lease and staging slots
        self.staging: kv.KvWelcome | None = None
        #: why a side refused us; the process ends with it
        self.refused: ErrorInfo | None = None
        self._load = load
        self._begun = False

    def begin(self, now: float) -> list[Send]:
        """The two hellos, once."""
        if self._begun:
            return []
        self._begun = True
        return [*self.router.hello(now), *self.relay.hello(now)]

    def take(self, now: float, peer: str, message: msgspec.Struct) -> tuple[list[Send], list[Link]] | None:
        """Handle a message that concerns the connection itself; None for all others."""
        side = self.router if peer == ROUTER else self.relay
        side.heard(now)
        match message:
            case worker.RouterPing():
                return [Send(ROUTER, worker.WorkerReport(self._load()))], []
            case kv.KvPing():
                return [Send(RELAY, kv.KvPong())], []
            case worker.WorkerWelcome(lease_s=lease_s):
                side.welcomed(now, lease_s)
                return [], [Link.ROUTER_JOINED]
            case kv.KvWelcome():
                self.staging = message
                side.welcomed(now, RELAY_SILENCE_S)
                return [], [Link.RELAY_JOINED]
            case worker.WorkerRefused(error=error) | kv.KvRefused(error=error):
                self.refused = error
                return [], []
            case worker.HelloWanted():
                return self._lost(now, side)
        return None

    def tick(self, now: float) -> tuple[list[Send], list[Link]]:
        """Look for silence."""
        sends: list[Send] = []
        links: list[Link] = []
        for side in (self.router, self.relay):
            if side.silent(now):
                more, lost = self._lost(now, side)
                sends += more
                links += lost
        return sends, links

    def peer_lost(self, now: float, peer: str) -> tuple[list[Send], list[Link]]:
        """Nothing could be sent to ``peer`` any more. The hello waits in the socket's queue or for a tick."""
        return self._lost(now, self.router if peer == ROUTER else self.relay)

    def deadline(self) -> float | None:
        """When to look for silence next."""
        return min(self.router.deadline(), self.relay.deadline()) if self._begun else None

    def _lost(self, now: float, side: Membership) -> tuple[list[Send], list[Link]]:
        known = side.joined
        lost = [Link.ROUTER_LOST if side is self.router else Link.RELAY_LOST] if known else []
        return list(side.hello(now)), lost
