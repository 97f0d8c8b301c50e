"""Registration, offers, direct readers: what the relay machine answers to whom."""

from __future__ import annotations

import msgspec
import pytest

from dsrelay.events import Complain
from dswire.errors import DuplicateName, KvCorrupt
from dswire.links import End, Ready
from dswire.machine import Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from support.handles import LAYOUT, make_handle
from support.relay_desk import LEASE_S, Desk, make_config

PREFILL, DECODE = "worker:prefill-0", "worker:decode-0"
HANDLE = make_handle()
KEY = HANDLE.key


@pytest.fixture
def desk() -> Desk:
    made = Desk()
    made.join("prefill-0")
    made.join("decode-0")
    return made


@pytest.fixture
def offered(desk: Desk) -> Desk:
    desk.say(PREFILL, kv.KvOffer(HANDLE))
    return desk


@pytest.fixture
def pulling(offered: Desk) -> Desk:
    offered.say(DECODE, kv.KvPull(HANDLE))
    assert offered.sent(DECODE, kv.KvGrant) == [kv.KvGrant(KEY)]
    return offered


def released(desk: Desk) -> list[str]:
    return [message.reason for message in desk.sent(PREFILL, kv.KvRelease)]


def cancelled(peer: str, result: str) -> Send:
    return Send(peer, kv.KvCancelled(KEY, result))


# registration


def test_a_worker_is_welcomed(desk: Desk) -> None:
    desk.join("decode-1")
    (welcome,) = desk.sent("worker:decode-1", kv.KvWelcome)
    assert (welcome.relay, welcome.lease_s, welcome.verify, welcome.direct) == ("relay-n0", LEASE_S, True, True)


def test_another_protocol_version_is_refused(desk: Desk) -> None:
    desk.say("worker:decode-1", kv.KvHello(PROTOCOL + 1, "decode-1", "1"))
    (refused,) = desk.sent("worker:decode-1", kv.KvRefused)
    assert refused.error.code == "version_mismatch"


def test_a_name_that_is_not_the_connections_is_refused(desk: Desk) -> None:
    desk.say("worker:decode-1", kv.KvHello(PROTOCOL, "decode-0", "1"))
    (refused,) = desk.sent("worker:decode-1", kv.KvRefused)
    assert refused.error.code == "protocol_error"


@pytest.mark.parametrize("message", [kv.KvPong(), kv.KvOffer(HANDLE), kv.KvPull(HANDLE), kv.KvAbort(KEY)])
def test_a_stranger_is_asked_for_its_hello(desk: Desk, message: msgspec.Struct) -> None:
    desk.say("worker:decode-1", message)
    assert desk.sent("worker:decode-1", worker.HelloWanted) == [worker.HelloWanted()]
    desk.assert_idle()


def test_workers_are_pinged_and_lost_when_silent(desk: Desk) -> None:
    desk.pass_time(1.0)
    assert desk.sent(PREFILL, kv.KvPing) == [kv.KvPing()]
    desk.pass_time(5.0, alive=("decode-0",))
    assert set(desk.state.workers.known) == {DECODE}
    desk.say(PREFILL, kv.KvPong())
    assert desk.sent(PREFILL, worker.HelloWanted) == [worker.HelloWanted()]


def test_the_router_is_greeted_and_makes_us_ready() -> None:
    desk = Desk()
    (hello,) = desk.sent("router", worker.WorkerHello)
    assert (hello.name, hello.role, hello.node, hello.protocol) == ("relay-n0", "relay", "n0", PROTOCOL)
    assert desk.say("router", worker.WorkerWelcome("router-0", "1", 5.0)) == [Ready()]


def test_a_silent_or_restarted_router_is_greeted_again_and_handles_stay(offered: Desk) -> None:
    offered.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
    offered.pass_time(5.0, alive=("prefill-0",))
    assert len(offered.sent("router", worker.WorkerHello)) == 1
    offered.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
    offered.say("router", worker.HelloWanted())
    assert len(offered.sent("router", worker.WorkerHello)) == 1
    assert KEY in offered.state.ledger.handles


def test_a_refusal_by_the_router_ends_the_process(desk: Desk) -> None:
    error = DuplicateName("relay-n0 is up already").info()
    assert desk.say("router", worker.WorkerRefused(error)) == [End(error)]


def test_a_ping_of_the_router_is_answered_with_the_handles_by_state(pulling: Desk) -> None:
    pulling.say(PREFILL, kv.KvOffer(make_handle("r2/0")))
    pulling.say("router", worker.RouterPing())
    (report,) = pulling.sent("router", worker.WorkerReport)
    assert report.load.handles == {"pulling": 1, "ready": 1}


# direct readers


def test_a_pull_on_the_same_node_is_granted_and_released(pulling: Desk) -> None:
    pulling.say(DECODE, kv.KvPulled(KEY))
    assert released(pulling) == ["pulled"]
    pulling.assert_idle()


def test_a_pull_before_its_offer_is_held(desk: Desk) -> None:
    assert desk.say(DECODE, kv.KvPull(HANDLE)) == []
    desk.say(PREFILL, kv.KvOffer(HANDLE))
    assert desk.sent(DECODE, kv.KvGrant) == [kv.KvGrant(KEY)]


def test_a_pull_whose_offer_never_comes_fails_typed(desk: Desk) -> None:
    desk.say(DECODE, kv.KvPull(HANDLE))
    desk.pass_time(2.0)
    (failed,) = desk.sent(DECODE, kv.KvFailed)
    assert failed.error.code == "transfer_failed"
    assert "was not offered on node n0" in failed.error.message
    desk.assert_idle()


def test_a_pull_held_early_can_be_aborted(desk: Desk) -> None:
    desk.say(DECODE, kv.KvPull(HANDLE))
    desk.say(DECODE, kv.KvAbort(KEY))
    desk.say(PREFILL, kv.KvOffer(HANDLE))
    assert desk.sent(DECODE, kv.KvGrant) == []
    assert desk.state.ledger.counts() == {"ready": 1}


def test_a_second_reader_is_told_who_reads(pulling: Desk) -> None:
    pulling.join("decode-1")
    pulling.say("worker:decode-1", kv.KvPull(HANDLE))
    (failed,) = pulling.sent("worker:decode-1", kv.KvFailed)
    assert "is pulling, for worker:decode-0" in failed.error.message
    assert pulling.state.ledger.counts() == {"pulling": 1}


def test_a_pull_of_another_handle_under_the_same_name_fails(offered: Desk) -> None:
    offered.say(DECODE, kv.KvPull(msgspec.structs.replace(HANDLE, checksum=7)))
    (failed,) = offered.sent(DECODE, kv.KvFailed)
    assert "is not the handle that prefill-0 offers" in failed.error.message
    assert offered.state.ledger.counts() == {"ready": 1}


def test_a_pull_that_ends_with_an_error_releases(pulling: Desk) -> None:
    pulling.say(DECODE, kv.KvPulled(KEY, KvCorrupt("flipped").info()))
    assert released(pulling) == ["lost"]


def test_an_abort_by_the_reader_releases(pulling: Desk) -> None:
    pulling.say(DECODE, kv.KvAbort(KEY))
    assert released(pulling) == ["aborted"]
    assert pulling.say(DECODE, kv.KvPulled(KEY)) == [], "it is over already"


def test_only_the_reader_can_end_a_reading(pulling: Desk) -> None:
    pulling.join("decode-1")
    for message in (kv.KvPulled(KEY), kv.KvAbort(KEY)):
        pulling.say("worker:decode-1", message)
    assert pulling.state.ledger.counts() == {"pulling": 1}


def test_a_withdrawal_waits_for_the_reader(pulling: Desk) -> None:
    assert pulling.say(PREFILL, kv.KvWithdraw(KEY)) == [cancelled(PREFILL, "in_flight_quarantined")]
    assert pulling.state.ledger.counts() == {"quarantined": 1}
    pulling.say(DECODE, kv.KvAbort(KEY))
    assert released(pulling) == ["withdrawn"]
    assert cancelled(DECODE, "freed") in pulling.actions
    assert pulling.say(DECODE, kv.KvAbort(KEY)) == [cancelled(DECODE, "unknown")]


def test_a_withdrawal_waits_one_lease_at_most(pulling: Desk) -> None:
    pulling.say(PREFILL, kv.KvWithdraw(KEY))
    for _ in range(6):
        pulling.say(DECODE, kv.KvExtend(((KEY, "n0"),)))
        pulling.pass_time(LEASE_S / 6, alive=("prefill-0", "decode-0"))
    assert released(pulling) == ["withdrawn"]
    assert len(pulling.sent(DECODE, kv.KvFailed)) == 1
    pulling.assert_idle()


def test_a_withdrawal_of_what_nobody_reads_is_granted_at_once(offered: Desk) -> None:
    offered.say(PREFILL, kv.KvWithdraw(KEY))
    assert released(offered) == ["withdrawn"]
    assert cancelled(PREFILL, "freed") in offered.actions
    assert offered.say(PREFILL, kv.KvWithdraw(KEY)) == [cancelled(PREFILL, "unknown")]


def test_an_abort_before_the_offer_is_freed(desk: Desk) -> None:
    desk.say(DECODE, kv.KvPull(HANDLE))
    assert desk.say(DECODE, kv.KvAbort(KEY)) == [cancelled(DECODE, "freed")]
    desk.assert_idle()


def test_a_release_that_was_lost_comes_again_when_the_owner_asks(offered: Desk) -> None:
    assert offered.say(PREFILL, kv.KvHeld(KEY)) == []
    offered.say(PREFILL, kv.KvWithdraw(KEY))
    assert offered.say(PREFILL, kv.KvHeld(KEY)) == [Send(PREFILL, kv.KvRelease(KEY, "lost"))]
    offered.join("prefill-1")
    offered.say(PREFILL, kv.KvOffer(HANDLE))
    offered.say("worker:prefill-1", kv.KvHeld(KEY))
    assert offered.sent("worker:prefill-1", kv.KvRelease) == [kv.KvRelease(KEY, "lost")], "it is another's"


# leases


def test_a_lease_ends(offered: Desk) -> None:
    offered.pass_time(LEASE_S, alive=("prefill-0", "decode-0"))
    assert released(offered) == ["expired"]
    offered.say(DECODE, kv.KvPull(HANDLE))
    offered.pass_time(2.0, alive=("prefill-0", "decode-0"))
    assert len(offered.sent(DECODE, kv.KvFailed)) == 1


def test_an_extended_lease_begins_anew(offered: Desk) -> None:
    offered.pass_time(LEASE_S - 1, alive=("prefill-0", "decode-0"))
    offered.say(DECODE, kv.KvExtend(((KEY, "n0"), (KEY, "n9"))))
    offered.pass_time(LEASE_S - 1, alive=("prefill-0", "decode-0"))
    assert offered.state.ledger.counts() == {"ready": 1}


def test_a_reader_that_never_ends_is_bounded(pulling: Desk) -> None:
    pulling.pass_time(LEASE_S, alive=("prefill-0", "decode-0"))
    assert pulling.state.ledger.counts() == {"quarantined": 1}
    assert len(pulling.sent(DECODE, kv.KvFailed)) == 1, "it is told to stop"
    pulling.pass_time(1.0, alive=("prefill-0", "decode-0"))
    assert released(pulling) == ["expired"]
    assert not pulling.sent(DECODE, kv.KvFailed)
    pulling.assert_idle()


# losses


def test_a_lost_owner_fails_its_reader(pulling: Desk) -> None:
    pulling.lose(PREFILL)
    (failed,) = pulling.sent(DECODE, kv.KvFailed)
    assert (failed.error.code, "prefill-0" in failed.error.message) == ("transfer_failed", True)
    assert released(pulling) == [], "there is nobody to tell"
    pulling.assert_idle()


def test_a_lost_reader_releases(pulling: Desk) -> None:
    pulling.lose(DECODE)
    assert released(pulling) == ["lost"]


def test_a_silent_reader_releases(pulling: Desk) -> None:
    pulling.pass_time(6.0, alive=("prefill-0",))
    assert released(pulling) == ["lost"]


def test_a_restarted_owner_loses_its_handles(pulling: Desk) -> None:
    pulling.join("prefill-0", "2")
    assert len(pulling.sent(DECODE, kv.KvFailed)) == 1
    pulling.assert_idle()


def test_the_same_owner_again_keeps_its_handles_and_may_offer_them_again(offered: Desk) -> None:
    offered.pass_time(LEASE_S - 1, alive=("prefill-0",))
    offered.join("prefill-0")
    assert offered.say(PREFILL, kv.KvOffer(HANDLE)) == []
    assert offered.state.ledger.counts() == {"ready": 1}
    offered.pass_time(1.0, alive=("prefill-0",))
    assert released(offered) == ["expired"], "nobody has said that it wants it"


def test_an_offer_may_have_less_than_a_lease_left(desk: Desk) -> None:
    desk.say(PREFILL, kv.KvOffer(HANDLE, 5.0))
    desk.say(PREFILL, kv.KvOffer(make_handle("r2/0"), 1e9))
    desk.pass_time(5.0, alive=("prefill-0", "decode-0"))
    assert released(desk) == ["expired"]
    desk.pass_time(LEASE_S - 5.0, alive=("prefill-0", "decode-0"))
    assert released(desk) == ["expired"]


def test_a_reader_that_says_hello_again_has_forgotten_what_it_read(pulling: Desk) -> None:
    pulling.join("decode-0")
    assert released(pulling) == ["lost"]


def test_after_a_restart_of_the_relay_the_handles_come_back() -> None:
    desk = Desk(make_config(incarnation="relay-2"))
    desk.say(PREFILL, kv.KvWithdraw(KEY))
    assert desk.sent(PREFILL, worker.HelloWanted) == [worker.HelloWanted()]
    desk.join("prefill-0")
    desk.say(PREFILL, kv.KvOffer(HANDLE))
    desk.say(PREFILL, kv.KvWithdraw(KEY))
    assert released(desk) == ["withdrawn"]


# nonsense


@pytest.mark.parametrize(
    "handle",
    [
        make_handle(owner="prefill-1"),
        make_handle(node="n1"),
        msgspec.structs.replace(HANDLE, tokens=0),
        msgspec.structs.replace(HANDLE, layout=msgspec.structs.replace(LAYOUT, dtype="int3")),
    ],
    ids=["owner", "node", "tokens", "dtype"],
)
def test_an_offer_that_cannot_be_is_given_back(desk: Desk, handle: object) -> None:
    desk.say(PREFILL, kv.KvOffer(handle))  # type: ignore[arg-type]
    assert released(desk) == ["lost"]
    assert any(isinstance(action, Complain) for action in desk.actions)
    desk.assert_idle()


def test_an_offer_of_somebody_elses_key_is_given_back(pulling: Desk) -> None:
    pulling.join("prefill-1")
    pulling.say("worker:prefill-1", kv.KvOffer(make_handle(owner="prefill-1")))
    (release,) = pulling.sent("worker:prefill-1", kv.KvRelease)
    assert release.reason == "lost"
    assert pulling.state.ledger.handles[KEY].handle == HANDLE


def test_another_offer_under_the_same_key_takes_the_place_of_the_first(pulling: Desk) -> None:
    pulling.say(PREFILL, kv.KvOffer(msgspec.structs.replace(HANDLE, checksum=7)))
    assert len(pulling.sent(DECODE, kv.KvFailed)) == 1
    assert released(pulling) == []
    assert pulling.state.ledger.counts() == {"ready": 1}


@pytest.mark.parametrize("peer", ["worker:prefill-0", "router", "relay:n1", "fetcher:relay-n1"])
def test_a_message_that_is_none_of_a_peers_is_complained_of(desk: Desk, peer: str) -> None:
    desk.join_fetcher("relay-n1")
    desk.say(peer, kv.KvGrant(KEY))
    (complaint,) = desk.actions
    assert isinstance(complaint, Complain)
    assert complaint.error.code == "protocol_error"


def test_a_lost_router_is_no_reason_to_stop(desk: Desk) -> None:
    assert desk.lose("router") == []
    assert desk.feed(Tick(desk.now)) == []
