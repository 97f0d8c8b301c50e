"""The client's machine: connection, loss and reconnect, repair, and that every wait ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dsclient.events import (
    Action,
    Answer,
    Closed,
    ConnectAsked,
    Deliver,
    Denied,
    End,
    Event,
    Garbled,
    RequestAttached,
    RequestCancelled,
    RequestLeft,
    RequestOpened,
    StatusAsked,
)
from dsclient.state import LEASE_MIN_S, ROUTER, ClientState, Phase
from dswire.errors import (
    Cancelled,
    DeadlineExceeded,
    DsError,
    Overloaded,
    ProtocolError,
    RouterLost,
    Unauthorized,
    UnknownRequest,
    VersionMismatch,
)
from dswire.machine import Received, Send, Tick
from dswire.messages import PROTOCOL, client
from support.scripted_router import events, failed

LEASE_S = 6.0
TIMEOUT_S = 10.0


def welcome(incarnation: str = "one", protocol: int = PROTOCOL, lease_s: float = LEASE_S) -> client.ClientWelcome:
    return client.ClientWelcome(protocol, "router-0", incarnation, "toy", 128, lease_s)


def submit(request_id: str = "r", deadline_s: float | None = None) -> client.Submit:
    return client.Submit(request_id, prompt="hello", deadline_s=deadline_s)


@dataclass
class Bench:
    """A machine, its clock, and what it did last."""

    state: ClientState = field(
        default_factory=lambda: ClientState("tcp://router", agent="test", timeout_s=TIMEOUT_S)
    )
    now: float = 100.0

    def do(self, event: Event) -> list[Action]:
        actions = self.state.handle(event)
        self.state.validate()
        return actions

    def get(self, *messages: msgspec.Struct) -> list[Action]:
        return [action for one in messages for action in self.do(Received(self.now, ROUTER, one))]

    def joined(self) -> Bench:
        self.do(ConnectAsked(self.now, "connect"))
        self.get(welcome())
        return self

    def open(self, message: client.Submit) -> list[Action]:
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
    return [action.message for action in actions if isinstance(action, Send)]


def delivered(actions: list[Action]) -> list[int]:
    return [action.event.number for action in actions if isinstance(action, Deliver)]


def errors(actions: list[Action]) -> list[tuple[str, type[DsError]]]:
    return [(action.request_id, type(action.error)) for action in actions if isinstance(action, End)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def joined() -> Bench:
    return Bench().joined()


# connection


def test_says_hello_first_and_submits_when_welcomed(bench: Bench) -> None:
    assert sent(bench.open(submit())) == [client.ClientHello(PROTOCOL, "test")]
    assert sent(bench.get(welcome())) == [submit()]


def test_hello_is_said_again_while_unanswered(bench: Bench) -> None:
    bench.do(ConnectAsked(bench.now, "connect"))
    hellos = sent(bench.at(TIMEOUT_S - 0.1))
    assert hellos == [client.ClientHello(PROTOCOL, "test")] * 3  # after 1, 3 and 7 seconds


def test_no_welcome_within_the_timeout_is_router_lost(bench: Bench) -> None:
    bench.do(ConnectAsked(bench.now, "connect"))
    bench.open(submit())
    actions = bench.at(TIMEOUT_S)
    assert errors(actions) == [("r", RouterLost)]
    (answer,) = [action for action in actions if isinstance(action, Answer)]
    assert answer.ask == "connect"
    assert isinstance(answer.result, RouterLost)
    assert "tcp://router" in answer.result.message


def test_a_request_never_sent_is_forgotten_with_its_error(bench: Bench) -> None:
    bench.open(submit())
    bench.at(TIMEOUT_S)
    assert sent(bench.get(welcome())) == []
    assert not bench.state.is_open("r")


def test_connect_is_answered_at_once_when_joined(joined: Bench) -> None:
    assert joined.do(ConnectAsked(joined.now, "again")) == [Answer("again", welcome())]


def test_pings_every_third_of_the_lease(joined: Bench) -> None:
    assert sent(joined.at(LEASE_S)) == [client.ClientPing()] * 3
    assert joined.state.phase is Phase.JOINED


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_absurd_lease_makes_no_storm_of_pings(bench: Bench, lease_s: float) -> None:
    bench.do(ConnectAsked(bench.now, "connect"))
    bench.get(welcome(lease_s=lease_s))
    deadline = bench.state.next_deadline()
    assert deadline is not None
    assert bench.now + LEASE_MIN_S / 3 <= deadline < bench.now + 3600


def test_another_protocol_is_refused_by_the_client(bench: Bench) -> None:
    bench.open(submit())
    actions = bench.get(welcome(protocol=PROTOCOL + 1))
    assert errors(actions) == [("r", VersionMismatch)]
    assert bench.state.phase is Phase.IDLE


def test_refusal_of_the_hello_ends_every_wait_and_the_next_call_tries_again(bench: Bench) -> None:
    bench.do(StatusAsked(bench.now, "status"))
    bench.open(submit())
    refusal = client.ClientRefused(VersionMismatch("no").info())
    actions = bench.get(refusal)
    assert errors(actions) == [("r", VersionMismatch)]
    assert [action.ask for action in actions if isinstance(action, Answer)] == ["status"]
    assert bench.state.next_deadline() is None
    assert sent(bench.do(ConnectAsked(bench.now, "again"))) == [client.ClientHello(PROTOCOL, "test")]


def test_denied_keys_end_the_wait(bench: Bench) -> None:
    bench.open(submit())
    assert errors(bench.do(Denied(bench.now, Unauthorized("no")))) == [("r", Unauthorized)]
    assert bench.do(Denied(bench.now, Unauthorized("no"))) == []


# requests that go well


def test_events_are_delivered_in_order_and_the_end_closes_the_request(joined: Bench) -> None:
    assert sent(joined.open(submit())) == [submit()]
    assert delivered(joined.get(*events("r", "a", "b"))) == [0, 1, 2, 3]
    assert not joined.state.is_open("r")


def test_duplicates_are_dropped(joined: Bench) -> None:
    joined.open(submit())
    first, second, *rest = events("r", "a", "b")
    assert delivered(joined.get(first, second, first, second, *rest, *rest)) == [0, 1, 2, 3]


def test_a_failure_comes_out_as_its_own_class(joined: Bench) -> None:
    joined.open(submit())
    assert errors(joined.get(failed("r", 0, Overloaded("full")))) == [("r", Overloaded)]


def test_status_asks_share_one_report_and_have_a_deadline(joined: Bench) -> None:
    joined.do(StatusAsked(joined.now, "a"))
    joined.do(StatusAsked(joined.now, "b"))
    report = client.StatusReport("router-0", "one", "toy", 1.0, (), {}, {})
    assert joined.get(report) == [Answer("a", report), Answer("b", report)]
    joined.do(StatusAsked(joined.now, "c"))
    (answer,) = [action for action in joined.at(TIMEOUT_S) if isinstance(action, Answer)]
    assert isinstance(answer.result, RouterLost)


# gaps and quiet


def test_a_gap_asks_once_for_what_is_missing(joined: Bench) -> None:
    joined.open(submit())
    stream = events("r", "a", "b", "c")
    assert sent(joined.get(stream[0], stream[2], stream[3])) == [client.Attach("r", 1)]
    assert delivered(joined.get(*stream[1:])) == [1, 2, 3, 4]


def test_a_quiet_request_is_probed_a_busy_one_is_not(joined: Bench) -> None:
    joined.open(submit())
    joined.get(events("r", "a")[0])
    joined.now += LEASE_S / 6
    joined.get(events("r", "a")[1])
    quiet = [message for message in sent(joined.at(LEASE_S / 3 + 0.01)) if isinstance(message, client.Attach)]
    assert quiet == [client.Attach("r", 2)]


def test_a_request_not_even_accepted_is_submitted_again(joined: Bench) -> None:
    joined.open(submit(deadline_s=30.0))
    again = [message for message in sent(joined.at(LEASE_S / 3)) if isinstance(message, client.Submit)]
    assert again == [submit(deadline_s=30.0 - LEASE_S / 3)]


# loss and reconnect


def test_silence_for_a_lease_is_loss_and_open_requests_are_attached_again(joined: Bench) -> None:
    joined.open(submit())
    joined.get(*events("r", "a", "b")[:2])
    actions = joined.at(LEASE_S, router_speaks=False)
    assert joined.state.phase is Phase.GREETING
    assert client.ClientHello(PROTOCOL, "test") in sent(actions)
    assert sent(joined.get(welcome())) == [client.Attach("r", 2)]
    assert delivered(joined.get(*events("r", "a", "b")[2:])) == [2, 3]


def test_hello_wanted_is_answered_and_requests_go_on(joined: Bench) -> None:
    joined.open(submit())
    joined.get(*events("r", "a")[:1])
    assert sent(joined.get(client.ClientHelloWanted())) == [client.ClientHello(PROTOCOL, "test")]
    assert sent(joined.get(client.ClientHelloWanted())) == []
    assert sent(joined.get(welcome())) == [client.Attach("r", 1)]
    assert sent(joined.get(welcome())) == []


def test_a_restarted_router_has_lost_what_was_begun_and_gets_what_was_not(joined: Bench) -> None:
    joined.open(submit("begun"))
    joined.open(submit("unheard"))
    joined.get(events("begun", "a")[0], client.ClientHelloWanted())
    actions = joined.get(welcome("two"))
    assert errors(actions) == [("begun", RouterLost)]
    assert sent(actions) == [submit("unheard")]


def test_a_pong_of_another_incarnation_is_a_restart(joined: Bench) -> None:
    assert sent(joined.get(client.ClientPong("two"))) == [client.ClientHello(PROTOCOL, "test")]


def test_unknown_request_ends_it_whatever_its_number(joined: Bench) -> None:
    joined.open(submit())
    joined.get(*events("r", "a", "b")[:3])
    assert errors(joined.get(failed("r", 0, UnknownRequest("gone")))) == [("r", UnknownRequest)]


def test_without_a_router_a_request_ends_after_lease_and_timeout(joined: Bench) -> None:
    joined.open(submit())
    joined.get(events("r", "a")[0])
    assert errors(joined.at(LEASE_S + TIMEOUT_S - 0.01, router_speaks=False)) == []
    assert errors(joined.at(0.01, router_speaks=False)) == [("r", RouterLost)]
    assert client.Cancel("r") in sent(joined.get(welcome()))


def test_a_request_that_waits_in_a_queue_is_not_given_up_while_pongs_come(joined: Bench) -> None:
    joined.open(submit())
    joined.get(events("r", "a")[0])
    assert errors(joined.at(10 * (LEASE_S + TIMEOUT_S))) == []
    assert joined.state.is_open("r")


def test_a_deadline_that_the_router_does_not_keep_is_kept_here(joined: Bench) -> None:
    joined.open(submit(deadline_s=20.0))
    actions = joined.at(20.0 + TIMEOUT_S)
    assert errors(actions) == [("r", DeadlineExceeded)]
    assert client.Cancel("r") in sent(actions)


# stopping


def test_cancel_asks_the_router_whose_answer_ends_it(joined: Bench) -> None:
    joined.open(submit())
    assert joined.do(RequestCancelled(joined.now, "r")) == [Send(ROUTER, client.Cancel("r"))]
    assert errors(joined.get(failed("r", 0, Cancelled("by its client")))) == [("r", Cancelled)]


def test_cancel_before_anything_was_sent_ends_it_here(bench: Bench) -> None:
    bench.open(submit())
    assert errors(bench.do(RequestCancelled(bench.now, "r"))) == [("r", Cancelled)]
    assert sent(bench.get(welcome())) == []


def test_cancel_is_said_again_after_a_reconnect(joined: Bench) -> None:
    joined.open(submit())
    joined.get(events("r", "a")[0], client.ClientHelloWanted())
    assert sent(joined.do(RequestCancelled(joined.now, "r"))) == []
    assert sent(joined.get(welcome())) == [client.Attach("r", 1), client.Cancel("r")]


def test_cancel_of_a_foreign_id_is_passed_on(joined: Bench) -> None:
    assert sent(joined.do(RequestCancelled(joined.now, "other"))) == [client.Cancel("other")]


def test_a_request_left_is_cancelled_and_delivers_nothing_more(joined: Bench) -> None:
    joined.open(submit())
    joined.get(*events("r", "a", "b")[:2])
    assert sent(joined.do(RequestLeft(joined.now, "r"))) == [client.Cancel("r")]
    assert joined.do(RequestLeft(joined.now, "r")) == []
    assert joined.get(events("r", "a", "b")[2], failed("r", 3, Cancelled("by its client"))) == []
    assert not joined.state.is_open("r")


def test_leaving_is_said_again_after_a_reconnect_and_forgotten_after_a_restart(joined: Bench) -> None:
    joined.open(submit())
    joined.do(RequestLeft(joined.now, "r"))
    joined.get(client.ClientHelloWanted())
    assert sent(joined.get(welcome())) == [client.Cancel("r")]
    joined.get(client.ClientHelloWanted())
    assert sent(joined.get(welcome("two"))) == []
    assert not joined.state.is_open("r")


def test_leaving_unconfirmed_is_forgotten_in_time(joined: Bench) -> None:
    joined.open(submit())
    joined.do(RequestLeft(joined.now, "r"))
    joined.at(TIMEOUT_S)
    assert not joined.state.is_open("r")


def test_close_says_bye_and_ends_everything_once(joined: Bench) -> None:
    joined.open(submit())
    joined.do(StatusAsked(joined.now, "status"))
    actions = joined.do(Closed(joined.now))
    assert sent(actions) == [client.ClientBye()]
    assert errors(actions) == [("r", Cancelled)]
    assert joined.do(Closed(joined.now)) == []
    assert joined.get(*events("r", "a")) == []


# what cannot be read


def test_an_unreadable_message_of_ours_fails_those_not_answered_yet(joined: Bench) -> None:
    joined.open(submit("begun"))
    joined.get(events("begun", "a")[0])
    joined.open(submit("unheard"))
    actions = joined.get(client.ClientRefused(ProtocolError("what?").info()))
    assert errors(actions) == [("unheard", ProtocolError)]
    assert joined.state.is_open("begun")


def test_a_router_that_cannot_be_read_fails_every_request(joined: Bench) -> None:
    joined.open(submit())
    assert errors(joined.do(Garbled(joined.now, ProtocolError("garbage")))) == [("r", ProtocolError)]


def test_an_attached_request_asks_from_the_start_now_and_after_a_reconnect(joined: Bench) -> None:
    assert sent(joined.do(RequestAttached(joined.now, "r"))) == [client.Attach("r", 0)]
    joined.get(client.ClientHelloWanted())
    assert sent(joined.get(welcome())) == [client.Attach("r", 0)]
    assert delivered(joined.get(*events("r", "a"))) == [0, 1, 2]


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

    @rule()
    def silence_ends_every_wait(self) -> None:
        self.see(self.bench.at(LEASE_S + TIMEOUT_S + 0.01, router_speaks=False))
        assert not self.open

    @invariant()
    def an_open_request_is_open_in_the_machine(self) -> None:
        assert all(self.bench.state.is_open(request_id) for request_id in self.open)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
