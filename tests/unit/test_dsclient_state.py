"""The client's connection: hello, lease, loss, reconnect, and that every wait ends."""

from __future__ import annotations

import pytest

from dsclient.events import Answer, ConnectAsked, Denied, StatusAsked
from dsclient.state import LEASE_MIN_S, Phase
from dswire.errors import (
    DeadlineExceeded,
    RouterLost,
    Unauthorized,
    UnknownRequest,
    VersionMismatch,
)
from dswire.machine import Tick
from dswire.messages import PROTOCOL, client
from support.client_bench import LEASE_S, TIMEOUT_S, Bench, delivered, errors, sent, submit, welcome
from support.scripted_router import events, failed


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


def test_deadlines_that_come_all_at_once_end_a_request_once(joined: Bench) -> None:
    joined.open(submit(deadline_s=20.0))
    joined.get(client.ClientHelloWanted())
    assert len(errors(joined.do(Tick(joined.now + 1000.0)))) == 1
