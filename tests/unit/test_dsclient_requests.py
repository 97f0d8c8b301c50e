"""A client's open requests: order, gaps, cancelling, leaving."""

from __future__ import annotations

import pytest

from dsclient.events import (
    Answer,
    Closed,
    Garbled,
    RequestAttached,
    RequestCancelled,
    RequestLeft,
    StatusAsked,
)
from dsclient.state import ROUTER
from dswire.errors import Cancelled, Overloaded, ProtocolError, RouterLost
from dswire.machine import Send
from dswire.messages import client
from support.client_bench import LEASE_S, TIMEOUT_S, Bench, delivered, errors, sent, submit, welcome
from support.scripted_router import events, failed


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def joined() -> Bench:
    return Bench().joined()


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
