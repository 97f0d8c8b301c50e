"""How a decode machine fetches KV: by the relay's word, ahead of it, and what goes wrong."""

from __future__ import annotations

import pytest

from dsdecode.config import MAX_PULLS
from dsdecode.events import CopyDirect, CopyEnded, CopyStream, CutStream, OwnerTried, TryOwner
from dsdecode.sequence import Phase
from dskv.handle import KvKey
from dssched.steps import RunStep, StartSequence
from dswire.errors import ErrorInfo, KvCorrupt, TransferFailed
from dswire.machine import Received, Send, Tick
from dswire.messages import kv, worker
from dswire.messages.client import Sampling
from support.decode_desk import Desk
from support.handles import LAYOUT, make_handle
from support.instance_desk import LEASE_S
from support.relay_desk import TICKET


def own(desk: Desk, key: KvKey) -> tuple[int, ...]:
    """The blocks for what was pulled, without the one that the first step may need."""
    one = desk.state.sequences[key]
    return one.blocks[: LAYOUT.blocks_for(one.handle.tokens)]


@pytest.fixture
def desk() -> Desk:
    return Desk().joined()


def test_blocks_are_taken_then_the_kv_is_pulled(desk: Desk) -> None:
    key = desk.work("r", 8)
    (pull,) = desk.told("relay", kv.KvPull)
    assert pull.handle.key == key
    # eight tokens fill two blocks; the first step needs a third
    assert desk.state.pool.held == 3
    desk.say("relay", kv.KvGrant(key))
    assert desk.did(CopyDirect) == [CopyDirect(pull.handle, own(desk, key))]
    desk.feed(CopyEnded(desk.now, key))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key)]
    assert desk.did(StartSequence) == [StartSequence(key, tuple(range(1, 9)), (50,), Sampling(max_tokens=8))]
    (run,) = desk.did(RunStep)
    assert [(one.key, one.tokens, one.start, len(one.blocks)) for one in run.runs] == [(key, (50,), 8, 3)]


def test_kv_of_another_node_is_read_with_a_ticket(desk: Desk) -> None:
    key = desk.work("r", 12)
    (pull,) = desk.told("relay", kv.KvPull)
    desk.say("relay", kv.KvGrant(key, TICKET))
    assert desk.did(CopyStream) == [CopyStream(pull.handle, own(desk, key), TICKET)]
    desk.feed(CopyEnded(desk.now, key))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key)]


def test_a_stream_that_breaks_is_read_once_more(desk: Desk) -> None:
    key = desk.work("r", 12)
    desk.say("relay", kv.KvGrant(key, TICKET))
    error = TransferFailed("the relay has gone").info()
    desk.feed(CopyEnded(desk.now, key, error))
    assert desk.actions == [Send("relay", kv.KvAgain(key))]
    desk.say("relay", kv.KvGrant(key, TICKET))
    assert len(desk.did(CopyStream)) == 1
    desk.feed(CopyEnded(desk.now, key, error))
    assert desk.failures() == [(key, "transfer_failed")]
    assert desk.state.pool.held == 0


def test_an_abort_cuts_the_stream_and_waits_for_its_end(desk: Desk) -> None:
    key = desk.work("r", 12)
    desk.say("relay", kv.KvGrant(key, TICKET))
    desk.say("router", worker.Abort(key))
    assert desk.did(CutStream) == [CutStream(key)]
    assert desk.state.pool.held > 0, "a thread still writes"
    desk.feed(CopyEnded(desk.now, key, TransferFailed("it was cut").info()))
    assert desk.told("relay", kv.KvAbort) == [kv.KvAbort(key)]
    assert desk.state.pool.held == 0


def test_wrong_kv_is_told_to_both_sides(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvGrant(key))
    error = KvCorrupt("it is not what was sealed").info()
    desk.feed(CopyEnded(desk.now, key, error))
    assert desk.actions == [Send("relay", kv.KvAgain(key))], "once more, from the source"
    desk.say("relay", kv.KvGrant(key))
    desk.feed(CopyEnded(desk.now, key, error))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key, error)]
    assert desk.told("relay", kv.KvAbort) == []
    assert desk.failures() == [(key, "kv_corrupt")]
    assert desk.state.pool.held == 0


def test_a_pull_that_the_relay_gives_up_fails(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvFailed(key, ErrorInfo("transfer_failed", "no")))
    assert desk.failures() == [(key, "transfer_failed")]
    assert desk.told("relay", kv.KvAbort) == []
    assert desk.state.pool.held == 0


def test_wrong_kv_that_is_right_the_second_time_runs(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvGrant(key))
    desk.feed(CopyEnded(desk.now, key, KvCorrupt("it is not what was sealed").info()))
    desk.land(key)
    assert desk.phase(key) is Phase.RUNNING


def test_a_pull_of_which_nothing_is_heard_for_a_lease_fails(desk: Desk) -> None:
    key = desk.work("r")
    failures: list[tuple[KvKey, str]] = []
    for _ in range(int(LEASE_S) + 1):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
        desk.feed(Tick(desk.now))
        failures += desk.failures()
    assert failures == [(key, "transfer_failed")]
    assert desk.state.pool.held == 0


def test_only_so_many_pulls_at_once() -> None:
    desk = Desk(blocks=64, max_batch=40).joined()
    keys = [desk.work(str(number)) for number in range(MAX_PULLS + 2)]
    assert [desk.phase(key) for key in keys] == [Phase.PULLING] * MAX_PULLS + [Phase.WAITING] * 2
    desk.land(keys[0])
    assert [desk.phase(key) for key in keys[-2:]] == [Phase.PULLING, Phase.WAITING]


def test_a_sequence_waits_for_blocks_and_nobody_overtakes_it(desk: Desk) -> None:
    desk.running("a", 40)
    large, small = desk.work("b", 30), desk.work("c", 4)
    assert (desk.phase(large), desk.phase(small)) == (Phase.WAITING, Phase.WAITING)
    desk.say("router", worker.Abort(large))
    assert desk.phase(small) is Phase.PULLING


def test_nothing_is_pulled_while_the_relay_is_away(desk: Desk) -> None:
    pulling = desk.work("a")
    desk.say("relay", worker.HelloWanted())
    assert desk.failures() == [(pulling, "transfer_failed")]
    waiting = desk.work("b")
    assert desk.phase(waiting) is Phase.WAITING
    desk.say("relay", kv.KvWelcome("relay-n0", "2", LEASE_S))
    assert [pull.handle.key for pull in desk.told("relay", kv.KvPull)] == [waiting]


def test_leases_of_what_is_wanted_are_extended() -> None:
    desk = Desk(max_batch=2).joined()
    running, pulling, waiting = desk.running("a"), desk.work("b"), desk.work("c")
    assert desk.phase(running) is Phase.RUNNING
    for _ in range(10):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
    desk.feed(Tick(desk.now))
    assert desk.told("relay", kv.KvExtend) == [kv.KvExtend(((pulling, "n1"), (waiting, "n1")))]


# KV of the own node, copied before the relay's word


@pytest.fixture
def near() -> Desk:
    """On a node whose KV is always granted, never staged."""
    desk = Desk(node="n1")
    desk.joined()
    desk.say("relay", kv.KvWelcome("relay-n1", "2", LEASE_S, direct=True))
    return desk


def test_a_copy_does_not_wait_for_the_grant_and_tells_of_its_end_after_it(near: Desk) -> None:
    key = near.work("r", 8)
    (pull,) = near.told("relay", kv.KvPull)
    assert near.did(CopyDirect) == [CopyDirect(pull.handle, own(near, key))]
    near.feed(CopyEnded(near.now, key))
    assert near.phase(key) is Phase.RUNNING
    assert near.told("relay", kv.KvPulled) == [], "the relay does not know of a reader yet"
    near.say("relay", kv.KvGrant(key))
    assert near.actions == [Send("relay", kv.KvPulled(key))]
    near.say("relay", kv.KvGrant(key))
    assert near.actions == []


def test_a_grant_that_comes_during_the_copy_is_answered_at_its_end(near: Desk) -> None:
    key = near.work("r", 8)
    near.say("relay", kv.KvGrant(key))
    assert near.actions == []
    near.feed(CopyEnded(near.now, key))
    assert near.told("relay", kv.KvPulled) == [kv.KvPulled(key)]


@pytest.mark.parametrize("granted_first", [False, True])
def test_a_copy_that_was_too_early_is_made_again_when_granted(near: Desk, *, granted_first: bool) -> None:
    key = near.work("r", 8)
    ended = CopyEnded(near.now, key, TransferFailed("cannot be mapped").info())
    granted = Received(near.now, "relay", kv.KvGrant(key))
    near.feed(granted if granted_first else ended)
    assert near.did(CopyDirect) == []
    near.feed(ended if granted_first else granted)
    assert len(near.did(CopyDirect)) == 1
    assert near.failures() == []
    near.feed(CopyEnded(near.now, key))
    assert near.told("relay", kv.KvPulled) == [kv.KvPulled(key)]
    assert near.phase(key) is Phase.RUNNING


def test_a_refusal_after_a_verified_copy_changes_nothing(near: Desk) -> None:
    key = near.work("r", 8)
    near.feed(CopyEnded(near.now, key))
    near.say("relay", kv.KvFailed(key, ErrorInfo("transfer_failed", "its lease is over")))
    assert near.failures() == []
    assert near.phase(key) is Phase.RUNNING


def test_an_abort_during_an_early_copy_waits_for_its_end(near: Desk) -> None:
    key = near.work("r", 8)
    near.say("router", worker.Abort(key))
    assert near.phase(key) is Phase.DOOMED
    assert near.state.pool.held == 3
    near.feed(CopyEnded(near.now, key))
    assert near.told("relay", kv.KvAbort) == [kv.KvAbort(key)]
    assert near.state.pool.held == 0


def test_nothing_is_copied_early_that_no_checksum_would_prove(near: Desk) -> None:
    near.say("relay", kv.KvWelcome("relay-n1", "3", LEASE_S, verify=False, direct=True))
    near.work("r", 8)
    assert near.did(CopyDirect) == []


def test_an_owner_is_tried_for_the_relay() -> None:
    desk = Desk().joined()
    pool = kv.PoolInfo(LAYOUT, make_handle().shards, 16)
    assert desk.say("relay", kv.KvTry("prefill-0", pool)) == [TryOwner("prefill-0", pool)]
    met = kv.KvTry("prefill-1", meeting="10.0.0.1:9/x")
    assert desk.say("relay", met) == [TryOwner("prefill-1", None, "10.0.0.1:9/x")]
    told = kv.KvTried("prefill-0", 2e9)
    assert desk.feed(OwnerTried(desk.now, "prefill-0", 2e9)) == [Send("relay", told)]
    error = TransferFailed("its owner is gone").info()
    told = kv.KvTried("prefill-0", error=error)
    assert desk.feed(OwnerTried(desk.now, "prefill-0", 0.0, error)) == [Send("relay", told)]
