"""Workers that come and go, as the router sees it."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsrouter.events import Note
from dswire.machine import PeerLost, Send, Tick
from dswire.messages import PROTOCOL, worker
from support.handles import LAYOUT
from support.router_desk import MODEL, Desk, only


@pytest.fixture
def desk() -> Desk:
    return Desk().join("prefill-0", "decode-0")


def test_a_report_that_counts_more_than_came_costs_the_worker_its_place(desk: Desk) -> None:
    desk.submit()
    desk.say("prefill-0", worker.WorkerReport(worker.Load(), sent=0))
    assert desk.state.workers.get("prefill-0") is not None
    desk.say("prefill-0", worker.WorkerReport(worker.Load(), sent=2))
    assert desk.told("prefill-0", worker.HelloWanted) == [worker.HelloWanted()]
    assert desk.state.workers.get("prefill-0") is None
    desk.join("prefill-0")
    assert only(desk.told("prefill-0", worker.PrefillWork)).key.epoch == 1


def test_pings_count_what_was_sent(desk: Desk) -> None:
    desk.submit()
    desk.now = 1.0
    desk.feed(Tick(desk.now))
    assert desk.told("prefill-0", worker.RouterPing) == [worker.RouterPing(1)]
    assert desk.told("decode-0", worker.RouterPing) == [worker.RouterPing(0)]


def test_a_relay_counts_nothing(desk: Desk) -> None:
    desk.say("prefill-0", worker.WorkerReport(worker.Load(running=1)))
    status = {one.name: one for one in desk.state.workers.status(desk.now)}
    assert status["prefill-0"].running == 1


# comings and goings


def test_a_worker_that_says_hello_again_has_forgotten_everything(desk: Desk) -> None:
    desk.submit()
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.join("prefill-0")
    assert desk.told("prefill-0", worker.Abort) == [worker.Abort(key)]
    assert only(desk.told("prefill-0", worker.PrefillWork)).key != key


def test_messages_of_strangers_are_answered_with_a_wanted_hello(desk: Desk) -> None:
    key = KvKey("r/0", 0)
    for message in (worker.PrefillDone(key, 1, 0.0, 0.0), worker.WorkerReport(worker.Load()), worker.WorkerBye()):
        assert desk.say("stranger", message) == [Send("stranger", worker.HelloWanted())]


def test_a_worker_that_cannot_be_reached_is_lost(desk: Desk) -> None:
    desk.submit()
    desk.feed(PeerLost(desk.now, "prefill-0"))
    assert desk.state.workers.get("prefill-0") is None
    desk.feed(PeerLost(desk.now, "prefill-0"))
    desk.join("prefill-1")
    assert len(desk.told("prefill-1", worker.PrefillWork)) == 1


def test_comings_and_goings_are_told_with_their_reason(desk: Desk) -> None:
    desk.join("prefill-1", node="n7")
    assert desk.did(Note) == [Note("worker joined", {"worker": "prefill-1", "node": "n7"})]
    desk.say("prefill-1", worker.WorkerBye())
    assert desk.did(Note) == [Note("worker left", {"worker": "prefill-1"})]
    desk.feed(PeerLost(desk.now, "decode-0"))
    why = "nothing can be sent to it"
    assert desk.did(Note) == [Note("worker lost", {"worker": "decode-0", "why": why}, warning=True)]
    while desk.now < 6.0:
        assert desk.did(Note) == [] or desk.now == 0.0
        desk.now += 1.0
        desk.feed(Tick(desk.now))
    (lost,) = desk.did(Note)
    assert (lost.about, lost.warning) == ({"worker": "prefill-0", "why": "silent for 6.0 s"}, True)


def test_a_router_that_stood_still_blames_nobody_for_it(desk: Desk) -> None:
    desk.submit()
    desk.now = 1.0
    desk.feed(Tick(desk.now))
    # far longer than any lease: what others said in the meantime is still to be read
    desk.now = 60.0
    desk.feed(Tick(desk.now))
    assert desk.did(Note) == [Note("slept", {"seconds": "58.0"}, warning=True)]
    assert desk.state.workers.get("prefill-0") is not None
    assert desk.state.requests["r"].live
    # from now on silence counts again
    while desk.now < 67.0:
        desk.now += 1.0
        desk.feed(Tick(desk.now))
    assert desk.state.workers.get("prefill-0") is None
    assert "r" not in desk.state.requests


def test_a_name_that_is_taken_over_is_told(desk: Desk) -> None:
    capacity = worker.Capacity(32, LAYOUT)
    hello = worker.WorkerHello(PROTOCOL, "decode-0", "decode", "n0", "2", MODEL, capacity)
    desk.say("decode-0~2", hello)
    assert desk.did(Note) == []
    desk.now = 1.0
    desk.feed(Tick(desk.now))
    lost, joined = desk.did(Note)
    assert "another process came with its name" in lost.about["why"]
    assert joined.event == "worker joined"
