"""The machine of an instance under a clock of its own: what the desks of prefill and decode have in common."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

import msgspec

from dskv.handle import KvKey
from dssched.instance import InstanceState
from dssched.steps import Made, Stepped
from dswire.errors import ErrorInfo
from dswire.machine import Received, Send, Tick
from dswire.messages import kv, worker

ActionT = TypeVar("ActionT")
MessageT = TypeVar("MessageT", bound=msgspec.Struct)
StateT = TypeVar("StateT", bound=InstanceState)

MODEL = worker.ModelIdentity("tiny", "f", "float16")
LEASE_S = 30.0


class InstanceDesk(Generic[StateT]):
    """One machine, validated after every event."""

    #: of every step
    step_s: float

    def __init__(self, state: StateT) -> None:
        self.state = state
        self.now = 100.0
        self.actions: list[Any] = []
        #: work and aborts that the router sent
        self.router_sent = 0

    def feed(self, event: Any) -> list[Any]:
        self.actions = self.state.handle(event)
        self.state.validate()
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Any]:
        told = worker.PrefillWork | worker.DecodeWork | worker.DecodeMore | worker.Abort
        self.router_sent += isinstance(message, told)
        return self.feed(Received(self.now, peer, message))

    def ping(self) -> list[Any]:
        """The router's ping."""
        return self.say("router", worker.RouterPing(self.router_sent))

    def joined(self) -> Self:
        self.feed(Tick(self.now))
        self.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
        self.say("relay", kv.KvWelcome("relay-n0", "1", LEASE_S))
        return self

    def did(self, kind: type[ActionT]) -> list[ActionT]:
        return [action for action in self.actions if isinstance(action, kind)]

    def told(self, peer: str, kind: type[MessageT]) -> list[MessageT]:
        sends = [action for action in self.did(Send) if action.peer == peer]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def step(self, *keys: KvKey, token: int = 7) -> list[Any]:
        return self.end(*(Made(key, token) for key in keys))

    def end(self, *made: Made, failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()) -> list[Any]:
        """The oldest step ends."""
        return self.feed(Stepped(self.now, min(self.state.steps), made, self.step_s, failed))
