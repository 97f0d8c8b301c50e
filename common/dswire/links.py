"""The two connections of a prefill or decode instance: to the router, and to the relay of its node.

Pure. It answers pings and hellos and tells the machine when one of the two was lost, which is when the other
side says ``HelloWanted`` (it was restarted) or was silent for its lease, or when messages of the router were lost
with a connection that broke and healed. The relay is greeted only after the router's first welcome, so that a
second process of a live name takes nobody's place there before it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import msgspec

from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.membership import Membership
from dswire.messages import kv, worker

ROUTER = "router"
RELAY = "relay"
#: a relay pings every second; silent for this long, in seconds, or for its lease, it is lost
RELAY_SILENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Ready:
    """Action: the router knows us."""


@dataclass(frozen=True, slots=True)
class End:
    """Action: we were refused; the process ends with this error."""

    error: ErrorInfo


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
        *,
        relayed: bool = True,
    ) -> None:
        """``relayed``: whether there is a relay at all."""
        self.router = Membership(ROUTER, router_hello)
        self.relay = Membership(RELAY, relay_hello)
        self._relayed = relayed
        #: the relay's welcome, once it came
        self.welcome: kv.KvWelcome | None = None
        #: why a side refused us; the process ends with it
        self.refused: ErrorInfo | None = None
        self._load = load
        #: whether the router was greeted, and the relay
        self._begun = self._relay_begun = False
        #: messages to the router since the hello, and from it since the welcome; pings and reports do not count
        self._sent = self._received = 0

    @property
    def early(self) -> bool:
        """Whether KV of this node may be copied before the relay's word."""
        return self.welcome is not None and self.welcome.early

    def begin(self, now: float) -> list[Send]:
        """The first hello, once."""
        if self._begun:
            return []
        self._begun = True
        return self.router.hello(now)

    def count(self, actions: Iterable[object]) -> None:
        """Count what leaves for the router: all actions of an event, in order."""
        for action in actions:
            if not isinstance(action, Send) or action.peer != ROUTER:
                continue
            if isinstance(action.message, worker.WorkerHello):
                self._sent = 0
            elif not isinstance(action.message, worker.WorkerReport):
                self._sent += 1

    def take(self, now: float, peer: str, message: msgspec.Struct) -> tuple[list[Send], list[Link]] | None:
        """Handle a message that concerns the connection itself; None for all others."""
        side = self.router if peer == ROUTER else self.relay
        side.heard(now)
        match message:
            case worker.RouterPing(sent=sent):
                if side.joined and sent != self._received:
                    return self._lost(now, side)
                return [Send(ROUTER, worker.WorkerReport(self._load(), self._sent))], []
            case kv.KvPing():
                return [Send(RELAY, kv.KvPong())], []
            case worker.WorkerWelcome(lease_s=lease_s):
                side.welcomed(now, lease_s)
                self._received = 0
                return self._greet_relay(now), [Link.ROUTER_JOINED]
            case kv.KvWelcome():
                self.welcome = message
                side.welcomed(now, min(RELAY_SILENCE_S, message.lease_s))
                return [], [Link.RELAY_JOINED]
            case worker.WorkerRefused(error=error) | kv.KvRefused(error=error):
                self.refused = error
                return [], []
            case worker.HelloWanted():
                # one is enough: the other messages that the other side could not place ask for it too
                return self._lost(now, side) if side.joined else ([], [])
        self._received += side is self.router
        return None

    def tick(self, now: float) -> tuple[list[Send], list[Link]]:
        """Look for silence."""
        sends: list[Send] = []
        links: list[Link] = []
        for side in self._sides():
            if side.silent(now):
                more, lost = self._lost(now, side)
                sends += more
                links += lost
        return sends, links

    def peer_lost(self, now: float, peer: str) -> tuple[list[Send], list[Link]]:
        """The queue to ``peer`` is full, so it was away for long. The hello waits for a tick."""
        side = self.router if peer == ROUTER else self.relay
        lost = self._link_lost(side)
        side.forget(now)
        return [], lost

    def deadline(self) -> float | None:
        """When to look for silence next."""
        if not self._begun:
            return None
        router = self.router.deadline()
        return min(router, self.relay.deadline()) if self._relay_begun else router

    def _sides(self) -> list[Membership]:
        greeted = ((self.router, self._begun), (self.relay, self._relay_begun))
        return [side for side, begun in greeted if begun]

    def _greet_relay(self, now: float) -> list[Send]:
        if self._relay_begun or not self._relayed:
            return []
        self._relay_begun = True
        return self.relay.hello(now)

    def _lost(self, now: float, side: Membership) -> tuple[list[Send], list[Link]]:
        lost = self._link_lost(side)
        return side.hello(now), lost

    def _link_lost(self, side: Membership) -> list[Link]:
        if not side.joined:
            return []
        return [Link.ROUTER_LOST if side is self.router else Link.RELAY_LOST]
