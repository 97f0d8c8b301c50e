"""A relay machine under a clock of its own, validated after every event."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from dskv.handle import KvKey
from dsrelay.config import RelayConfig
from dsrelay.events import Action, CloseStream, Event, OpenStream
from dsrelay.state import RelayState
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv

MessageT = TypeVar("MessageT", bound=msgspec.Struct)

LEASE_S = 30.0
TIMEOUT_S = 10.0
TICKET = kv.Ticket(b"t" * 16)


def make_config(
    node: str = "n0",
    *,
    sources: tuple[str, ...] = ("n1",),
    direct: bool = True,
    collective: str = "",
    incarnation: str = "relay-1",
) -> RelayConfig:
    return RelayConfig(
        name=f"relay-{node}",
        node=node,
        incarnation=incarnation,
        lease_s=LEASE_S,
        transfer_timeout_s=TIMEOUT_S,
        sources=sources,
        direct=direct,
        collective=collective,
    )


class Desk:
    """Feeds one machine and keeps what it answered last."""

    def __init__(self, config: RelayConfig | None = None) -> None:
        self.state = RelayState(config or make_config())
        self.now = 1000.0
        self.actions: list[Action] = []
        #: handles whose streams are open
        self.streams: set[KvKey] = set()
        self.feed(Tick(self.now))

    def feed(self, event: Event) -> list[Action]:
        self.actions = self.state.handle(event)
        self.state.validate()
        for action in self.actions:
            if isinstance(action, OpenStream):
                assert action.handle.key not in self.streams
                self.streams.add(action.handle.key)
            elif isinstance(action, CloseStream):
                self.streams.remove(action.key)
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Action]:
        return self.feed(Received(self.now, peer, message))

    def lose(self, peer: str) -> list[Action]:
        return self.feed(PeerLost(self.now, peer))

    def join(self, name: str, incarnation: str = "1") -> list[Action]:
        return self.say(f"worker:{name}", kv.KvHello(PROTOCOL, name, incarnation))

    def join_fetcher(self, name: str, incarnation: str = "1") -> list[Action]:
        return self.say(f"fetcher:{name}", kv.RelayHello(PROTOCOL, name, incarnation))

    def sent(self, peer: str, kind: type[MessageT]) -> list[MessageT]:
        """Messages of ``kind`` to ``peer`` among the last actions."""
        sends = [action for action in self.actions if isinstance(action, Send) and action.peer == peer]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def pass_time(self, seconds: float, *, alive: tuple[str, ...] = ()) -> list[Action]:
        """Tick at every deadline for ``seconds``; ``alive`` workers say a pong each second. All actions."""
        end, actions = self.now + seconds, []
        while True:
            deadline = self.state.next_deadline()
            step = min(end, self.now + 1.0, deadline if deadline is not None else end)
            self.now = max(self.now, step)
            for name in alive:
                actions += self.say(f"worker:{name}", kv.KvPong())
            if deadline is not None and deadline <= self.now:
                actions += self.feed(Tick(self.now))
            if self.now >= end:
                break
        self.actions = actions
        return actions

    def assert_idle(self) -> None:
        """Nothing is held."""
        state = self.state
        assert not state.ledger.handles
        assert not state.ledger.early
        assert not state.outgoing.transfers
        assert not state.outgoing.asked
        assert not state.incoming.transfers
        assert not state.keeper.kept
        assert not self.streams


def failure(desk: Desk, peer: str) -> str:
    """Code of the one failure among the last messages to ``peer``."""
    codes = [message.error.code for message in desk.sent(peer, kv.KvFailed)]
    codes += [message.error.code for message in desk.sent(peer, kv.KvFetchFailed)]
    assert len(codes) == 1
    return codes[0]
