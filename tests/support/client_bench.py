"""A client's machine on a bench: its clock in the test's hands, its router played by the test."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from dsclient.events import Action, ConnectAsked, Deliver, End, Event, RequestOpened
from dsclient.state import ROUTER, ClientState
from dswire.errors import DsError
from dswire.machine import Received, Send, Tick
from dswire.messages import PROTOCOL, client

LEASE_S = 6.0
TIMEOUT_S = 10.0


def welcome(incarnation: str = "one", protocol: int = PROTOCOL, lease_s: float = LEASE_S) -> client.ClientWelcome:
    """A router's welcome."""
    return client.ClientWelcome(protocol, "router-0", incarnation, "toy", 128, lease_s)


def submit(request_id: str = "r", deadline_s: float | None = None) -> client.Submit:
    """A request for an answer."""
    return client.Submit(request_id, prompt="hello", deadline_s=deadline_s)


@dataclass
class Bench:
    """A machine, its clock, and what it did last."""

    state: ClientState = field(
        default_factory=lambda: ClientState("tcp://router", agent="test", timeout_s=TIMEOUT_S)
    )
    now: float = 100.0

    def do(self, event: Event) -> list[Action]:
        """One event; the invariants are checked after it."""
        actions = self.state.handle(event)
        self.state.validate()
        return actions

    def get(self, *messages: msgspec.Struct) -> list[Action]:
        """Messages from the router."""
        return [action for one in messages for action in self.do(Received(self.now, ROUTER, one))]

    def joined(self) -> Bench:
        """Welcomed by the router."""
        self.do(ConnectAsked(self.now, "connect"))
        self.get(welcome())
        return self

    def open(self, message: client.Submit) -> list[Action]:
        """A new request."""
        return self.do(RequestOpened(self.now, message))

    def at(self, later_s: float, *, router_speaks: bool = True) -> list[Action]:
        """Let time pass, deadline by deadline; the router answers each ping unless it is silent."""
        until, actions = self.now + later_s, list[Action]()
        while (deadline := self.state.next_deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            done = self.do(Tick(self.now))
            actions += done
            if router_speaks and any(one.message == client.ClientPing() for one in done if isinstance(one, Send)):
                actions += self.get(client.ClientPong("one"))
        self.now = until
        return actions


def sent(actions: list[Action]) -> list[msgspec.Struct]:
    """The messages among actions."""
    return [action.message for action in actions if isinstance(action, Send)]


def delivered(actions: list[Action]) -> list[int]:
    """Numbers of the events among actions."""
    return [action.event.number for action in actions if isinstance(action, Deliver)]


def errors(actions: list[Action]) -> list[tuple[str, type[DsError]]]:
    """Requests that ended badly, and how."""
    return [(action.request_id, type(action.error)) for action in actions if isinstance(action, End)]
