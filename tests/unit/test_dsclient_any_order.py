"""Whatever happens to a client, in whatever order."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dsclient.events import (
    Action,
    ConnectAsked,
    Deliver,
    End,
    RequestAttached,
    RequestCancelled,
    RequestLeft,
    RequestOpened,
    StatusAsked,
)
from dswire.errors import Cancelled, DsError, ProtocolError, UnknownRequest
from dswire.machine import Tick
from dswire.messages import client
from support.client_bench import LEASE_S, TIMEOUT_S, Bench, submit, welcome
from support.scripted_router import events, failed

IDS = st.sampled_from(["a", "b", "c"])


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: invariants hold, each request ends once, silence ends every wait."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.open: set[str] = set()
        self.next: dict[str, int] = {}

    def see(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Deliver):
                assert action.request_id in self.open
                assert action.event.number == self.next[action.request_id]
                self.next[action.request_id] += 1
            if isinstance(action, End) or (
                isinstance(action, Deliver) and isinstance(action.event, client.Finished)
            ):
                assert action.request_id in self.open
                self.open.remove(action.request_id)

    @rule(request_id=IDS, attach=st.booleans(), deadline_s=st.none() | st.floats(0.1, 50))
    def begin(self, request_id: str, attach: bool, deadline_s: float | None) -> None:
        if self.bench.state.is_open(request_id):
            return
        self.open.add(request_id)
        self.next[request_id] = 0
        now = self.bench.now
        event = RequestAttached(now, request_id) if attach else RequestOpened(now, submit(request_id, deadline_s))
        self.see(self.bench.do(event))

    @rule(request_id=IDS)
    def cancel(self, request_id: str) -> None:
        self.see(self.bench.do(RequestCancelled(self.bench.now, request_id)))

    @rule(request_id=IDS)
    def leave(self, request_id: str) -> None:
        self.open.discard(request_id)
        self.see(self.bench.do(RequestLeft(self.bench.now, request_id)))

    @rule(request_id=IDS, number=st.integers(0, 5), code=st.sampled_from([Cancelled, UnknownRequest]))
    def fail(self, request_id: str, number: int, code: type[DsError]) -> None:
        self.see(self.bench.get(failed(request_id, number, code("told"))))

    @rule(request_id=IDS, first=st.integers(0, 4), last=st.integers(0, 4))
    def stream(self, request_id: str, first: int, last: int) -> None:
        self.see(self.bench.get(*events(request_id, "x", "y")[first:last]))

    @rule(ask=st.uuids(), status=st.booleans())
    def ask(self, ask: object, status: bool) -> None:
        event = StatusAsked if status else ConnectAsked
        self.see(self.bench.do(event(self.bench.now, str(ask))))

    @rule(
        message=st.sampled_from(
            [
                welcome(),
                welcome("two"),
                welcome(protocol=9),
                client.ClientHelloWanted(),
                client.ClientPong("one"),
                client.ClientPong("two"),
                client.ClientRefused(ProtocolError("no").info()),
                client.StatusReport("router-0", "one", "toy", 1.0, (), {}, {}),
            ]
        )
    )
    def router(self, message: msgspec.Struct) -> None:
        self.see(self.bench.get(message))

    @rule(later_s=st.floats(0.01, 12.0), router_speaks=st.booleans())
    def wait(self, later_s: float, router_speaks: bool) -> None:
        self.see(self.bench.at(later_s, router_speaks=router_speaks))

    @rule(later_s=st.floats(0.01, 40.0))
    def stall(self, later_s: float) -> None:
        """The process was stopped for a while: every deadline comes in one tick."""
        self.bench.now += later_s
        self.see(self.bench.do(Tick(self.bench.now)))

    @rule()
    def silence_ends_every_wait(self) -> None:
        self.see(self.bench.at(LEASE_S + TIMEOUT_S + 0.01, router_speaks=False))
        assert not self.open

    @invariant()
    def an_open_request_is_open_in_the_machine(self) -> None:
        assert all(self.bench.state.is_open(request_id) for request_id in self.open)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
