"""Copies of KV whose readers decode: room for them, their leases, and who may have which blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dskv.handle import KvHandle, KvKey
from dsrelay.events import CopyKept, KeptCopied, OpenStream
from dswire.errors import TransferFailed
from dswire.messages import kv, worker
from support.handles import LAYOUT, make_handle
from support.relay_desk import LEASE_S, Desk, make_config

OWNER, READER = "worker:prefill-0", "worker:decode-0"
NEXT = KvKey("r1/0", 7)


@pytest.fixture
def desk() -> Desk:
    """A relay with room for eight blocks of kept KV."""
    config = replace(make_config(), keep="/nowhere/relay.keep", keep_nbytes=8 * LAYOUT.block_nbytes + 1)
    desk = Desk(config)
    desk.say("router", worker.WorkerWelcome("router-0", "1", 1e6))
    for name in ("prefill-0", "decode-0"):
        desk.join(name)
    return desk


def hand_over(desk: Desk, sequence: str = "r1/0", blocks: int = 3) -> KvHandle:
    """KV is offered, and pulled to the end."""
    handle = make_handle(sequence, blocks=range(blocks))
    desk.say(OWNER, kv.KvOffer(handle))
    desk.say(READER, kv.KvPull(handle))
    desk.say(READER, kv.KvPulled(handle.key))
    return handle


def keep(desk: Desk, sequence: str = "r1/0", blocks: int = 3) -> KvHandle:
    """... and kept; returns it as the relay owns it."""
    handle = hand_over(desk, sequence, blocks)
    (action,) = (one for one in desk.actions if isinstance(one, CopyKept))
    assert action.handle == handle
    desk.feed(KeptCopied(desk.now, handle.key))
    assert desk.sent(OWNER, kv.KvRelease) == [kv.KvRelease(handle.key, "pulled")]
    return action.kept


def kept(desk: Desk) -> list[str]:
    """Sequences of which there are copies, the longest unused first."""
    return [key.sequence for key in desk.state.keeper.kept]


def test_the_owner_has_its_blocks_back_when_the_copy_is_there(desk: Desk) -> None:
    handle = hand_over(desk)
    assert desk.sent(OWNER, kv.KvRelease) == []
    assert desk.state.ledger.handles[handle.key].reader == "relay-n0"
    desk.feed(KeptCopied(desk.now, handle.key))
    assert desk.sent(OWNER, kv.KvRelease) == [kv.KvRelease(handle.key, "pulled")]
    assert not desk.state.ledger.handles
    desk.say("router", worker.RouterPing())
    (report,) = desk.sent("router", worker.WorkerReport)
    assert report.load.handles == {"kept": 1}


def test_a_copy_is_offered_under_another_key_and_stays(desk: Desk) -> None:
    mine = keep(desk)
    desk.say("router", worker.KvReoffer(mine.key, NEXT))
    (sealed,) = desk.sent("router", worker.KvSealed)
    assert (sealed.handle.key, sealed.handle.blocks, sealed.handle.owner) == (NEXT, mine.blocks, "relay-n0")
    assert desk.say(READER, kv.KvPull(sealed.handle))
    assert desk.sent(READER, kv.KvGrant) == [kv.KvGrant(NEXT)]
    desk.say(READER, kv.KvPulled(NEXT))
    assert not any(isinstance(action, CopyKept) for action in desk.actions)
    assert not desk.state.ledger.handles
    assert kept(desk) == ["r1/0"]


def test_another_relay_gets_a_ticket_for_it(desk: Desk) -> None:
    mine = keep(desk)
    desk.say("router", worker.KvReoffer(mine.key, NEXT))
    desk.join_fetcher("relay-n1")
    desk.say("fetcher:relay-n1", kv.KvFetch(NEXT, 1))
    (stream,) = (action for action in desk.actions if isinstance(action, OpenStream))
    assert (stream.handle.key, stream.handle.blocks, stream.handle.owner) == (NEXT, mine.blocks, "relay-n0")


@pytest.mark.parametrize("when", ["unknown", "copying", "dropped"])
def test_what_is_not_there_must_be_read_again(desk: Desk, when: str) -> None:
    key = hand_over(desk).key if when == "copying" else keep(desk).key
    if when == "dropped":
        desk.say("router", worker.Abort(key))
    desk.say("router", worker.KvReoffer(KvKey("r9/0", 0) if when == "unknown" else key, NEXT))
    assert desk.sent("router", worker.Preempted) == [worker.Preempted(NEXT)]


def test_the_longest_unused_makes_room(desk: Desk) -> None:
    first = keep(desk, "r1/0")
    keep(desk, "r2/0")
    desk.say("router", worker.KvReoffer(first.key, NEXT))
    desk.say("router", worker.Abort(NEXT))
    keep(desk, "r3/0")
    assert kept(desk) == ["r1/0", "r3/0"]


def test_what_is_in_use_makes_no_room(desk: Desk) -> None:
    first = keep(desk, "r1/0", 5)
    desk.say("router", worker.KvReoffer(first.key, NEXT))
    handle = hand_over(desk, "r2/0", 4)
    assert desk.sent(OWNER, kv.KvRelease) == [kv.KvRelease(handle.key, "pulled")]
    assert kept(desk) == ["r1/0"]


def test_what_never_fits_is_not_kept(desk: Desk) -> None:
    keep(desk, "r1/0")
    hand_over(desk, "r2/0", 9)
    assert kept(desk) == ["r1/0"]


def test_what_is_dropped_while_it_is_read_goes_with_its_reader(desk: Desk) -> None:
    mine = keep(desk)
    desk.say("router", worker.KvReoffer(mine.key, NEXT))
    (sealed,) = desk.sent("router", worker.KvSealed)
    desk.say(READER, kv.KvPull(sealed.handle))
    desk.say("router", worker.Abort(mine.key))
    assert kept(desk) == ["r1/0"]
    desk.say(READER, kv.KvPulled(NEXT))
    assert kept(desk) == []


@pytest.mark.parametrize("wanted", [False, True])
def test_a_copy_has_a_lease_from_the_router(desk: Desk, wanted: bool) -> None:
    mine = keep(desk)
    desk.pass_time(LEASE_S - 1, alive=("prefill-0", "decode-0"))
    if wanted:
        desk.say("router", worker.KvWanted((mine.key, NEXT)))
    desk.pass_time(2, alive=("prefill-0", "decode-0"))
    assert kept(desk) == ["r1/0"] * wanted


@pytest.mark.parametrize("cause", ["error", "owner lost", "aborted", "router lost"])
def test_a_copy_that_comes_to_nothing_gives_its_blocks_back(desk: Desk, cause: str) -> None:
    key = hand_over(desk).key
    match cause:
        case "owner lost":
            desk.lose(OWNER)
        case "aborted":
            desk.say("router", worker.Abort(key))
        case "router lost":
            desk.say("router", worker.HelloWanted())
    assert kept(desk) == ["r1/0"], "its blocks are written"
    desk.feed(KeptCopied(desk.now, key, TransferFailed("no").info() if cause == "error" else None))
    assert kept(desk) == []
    desk.join("prefill-0")
    keep(desk, "r2/0", 8)
    desk.say("router", worker.Abort(KvKey("r2/0", 0)))
    desk.assert_idle()


def test_nobody_poses_as_the_relay(desk: Desk) -> None:
    desk.join("relay-n0")
    (refused,) = desk.sent("worker:relay-n0", kv.KvRefused)
    assert refused.error.code == "protocol_error"
