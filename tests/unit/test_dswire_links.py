"""The two connections of an instance: greeting, loss, and messages that are missing."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dswire.errors import ErrorInfo
from dswire.links import RELAY, RELAY_SILENCE_S, ROUTER, Link, Links
from dswire.machine import Send
from dswire.membership import HELLO_RETRY_S
from dswire.messages import PROTOCOL, kv, worker

ROUTER_HELLO = worker.WorkerHello(PROTOCOL, "w", "prefill", "n0", "1")
RELAY_HELLO = kv.KvHello(PROTOCOL, "w", "1")
WELCOME = worker.WorkerWelcome("router-0", "1", 5.0)
KV_WELCOME = kv.KvWelcome("relay-n0", "1", 30.0)
ABORT = worker.Abort(KvKey("r/0", 0))


def make() -> Links:
    return Links(lambda: ROUTER_HELLO, lambda: RELAY_HELLO, worker.Load)


@pytest.fixture
def links() -> Links:
    """Both sides joined at time 10."""
    made = make()
    made.begin(10.0)
    made.take(10.0, ROUTER, WELCOME)
    made.take(10.0, RELAY, KV_WELCOME)
    return made


def test_the_relay_is_greeted_once_the_router_has_taken_us() -> None:
    links = make()
    assert links.deadline() is None
    assert links.begin(10.0) == [Send(ROUTER, ROUTER_HELLO)]
    assert links.begin(10.0) == []
    assert links.take(10.1, ROUTER, WELCOME) == ([Send(RELAY, RELAY_HELLO)], [Link.ROUTER_JOINED])
    assert links.take(10.2, RELAY, KV_WELCOME) == ([], [Link.RELAY_JOINED])
    assert links.welcome == KV_WELCOME
    # said again: the relay knows us already
    assert links.take(10.3, ROUTER, WELCOME) == ([], [Link.ROUTER_JOINED])


def test_a_refusal_of_either_side_is_kept() -> None:
    error = ErrorInfo("duplicate_name", "there is one")
    for peer, message in ((ROUTER, worker.WorkerRefused(error)), (RELAY, kv.KvRefused(error))):
        links = make()
        links.begin(10.0)
        assert links.take(10.1, peer, message) == ([], [])
        assert links.refused == error


def test_pings_are_answered(links: Links) -> None:
    assert links.take(10.5, ROUTER, worker.RouterPing()) == (
        [Send(ROUTER, worker.WorkerReport(worker.Load(), 0))],
        [],
    )
    assert links.take(10.5, RELAY, kv.KvPing()) == ([Send(RELAY, kv.KvPong())], [])


def test_other_messages_are_the_machines_business(links: Links) -> None:
    assert links.take(10.5, ROUTER, ABORT) is None
    assert links.take(10.5, RELAY, kv.KvRelease(KvKey("r/0", 0), "pulled")) is None


# lost messages


def test_the_report_tells_how_many_messages_were_sent(links: Links) -> None:
    failed = Send(ROUTER, worker.SequenceFailed(KvKey("r/0", 0), ErrorInfo("failed", "")))
    links.count([failed, Send(RELAY, kv.KvPong()), failed, Send(ROUTER, worker.WorkerReport(worker.Load()))])
    answer = links.take(10.5, ROUTER, worker.RouterPing())
    assert answer == ([Send(ROUTER, worker.WorkerReport(worker.Load(), 2))], [])
    links.count([Send(ROUTER, ROUTER_HELLO)])
    answer = links.take(10.6, ROUTER, worker.RouterPing())
    assert answer == ([Send(ROUTER, worker.WorkerReport(worker.Load(), 0))], [])


def test_a_ping_that_counts_more_than_came_means_that_the_router_is_lost(links: Links) -> None:
    links.take(10.5, ROUTER, ABORT)
    assert links.take(10.6, ROUTER, worker.RouterPing(1))
    assert links.router.joined
    assert links.take(10.7, ROUTER, worker.RouterPing(2)) == ([Send(ROUTER, ROUTER_HELLO)], [Link.ROUTER_LOST])
    # until it answers, what it counts is of another life of the connection
    report = [Send(ROUTER, worker.WorkerReport(worker.Load(), 0))]
    assert links.take(10.8, ROUTER, worker.RouterPing(3)) == (report, [])
    links.take(10.9, ROUTER, WELCOME)
    assert links.take(11.0, ROUTER, worker.RouterPing(0)) == (report, [])


# loss


def test_a_wanted_hello_means_a_restart(links: Links) -> None:
    assert links.take(11.0, ROUTER, worker.HelloWanted()) == ([Send(ROUTER, ROUTER_HELLO)], [Link.ROUTER_LOST])
    assert links.take(11.0, RELAY, worker.HelloWanted()) == ([Send(RELAY, RELAY_HELLO)], [Link.RELAY_LOST])


def test_a_hello_that_is_wanted_many_times_is_said_once(links: Links) -> None:
    links.take(11.0, ROUTER, worker.HelloWanted())
    assert links.take(11.1, ROUTER, worker.HelloWanted()) == ([], [])
    # should it have been lost, it is said again
    assert links.tick(11.1 + HELLO_RETRY_S)[0] == [Send(ROUTER, ROUTER_HELLO)]


def test_silence_means_loss(links: Links) -> None:
    links.take(12.0, RELAY, kv.KvPing())
    assert links.deadline() == 15.0
    assert links.tick(14.9) == ([], [])
    assert links.tick(15.0) == ([Send(ROUTER, ROUTER_HELLO)], [Link.ROUTER_LOST])
    assert links.tick(12.0 + RELAY_SILENCE_S) == (
        [Send(ROUTER, ROUTER_HELLO), Send(RELAY, RELAY_HELLO)],
        [Link.RELAY_LOST],
    )


@pytest.mark.parametrize(("peer", "link"), [(ROUTER, Link.ROUTER_LOST), (RELAY, Link.RELAY_LOST)])
def test_a_full_queue_means_loss_and_is_left_alone_for_a_while(links: Links, peer: str, link: Link) -> None:
    assert links.peer_lost(11.0, peer) == ([], [link])
    assert links.peer_lost(11.0, peer) == ([], [])
    assert links.deadline() == 11.0 + HELLO_RETRY_S
    sends, lost = links.tick(11.0 + HELLO_RETRY_S)
    assert [send.peer for send in sends] == [peer]
    assert lost == []
