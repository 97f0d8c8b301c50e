"""Every path to a node is tried before it is needed, and told with its rate or with what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsrelay.events import PathKnown, PoolProved, ProofArrived, ProvePool, SendProof
from dsrelay.paths import FIRST_NBYTES
from dswire.errors import TransferFailed
from dswire.machine import Send
from dswire.messages import PROTOCOL, kv, worker
from support.handles import LAYOUT, make_handle, whole
from support.relay_desk import SLOT_NBYTES, Desk, make_config

SOURCE = "relay:n1"
POOL = kv.PoolInfo(LAYOUT, whole("/pool"), 16)
GONE = TransferFailed("/pool: cannot be mapped: No such file or directory").info()


def proving(*, sources: tuple[str, ...] = ("n1",)) -> Desk:
    return Desk(replace(make_config(sources=sources), prove=True))


def paths(desk: Desk) -> list[kv.PathInfo]:
    desk.say("worker:anybody", kv.KvList())
    (listing,) = desk.sent("worker:anybody", kv.KvListing)
    return list(listing.paths)


def hello(desk: Desk) -> None:
    desk.say("worker:prefill-0", kv.KvHello(PROTOCOL, "prefill-0", "1", POOL))


def test_another_relay_is_asked_for_a_little_and_then_for_a_slot_against_the_clock() -> None:
    desk = proving()
    assert desk.sent(SOURCE, kv.KvProbe) == [kv.KvProbe(FIRST_NBYTES)]
    assert paths(desk) == [kv.PathInfo("n1", "tcp")]
    desk.now += 5.0
    desk.feed(ProofArrived(desk.now, SOURCE, FIRST_NBYTES))
    assert desk.actions == [Send(SOURCE, kv.KvProbe(SLOT_NBYTES))]
    desk.now += 0.5
    known = kv.PathInfo("n1", "tcp", 2.0 * SLOT_NBYTES)
    assert desk.feed(ProofArrived(desk.now, SOURCE, SLOT_NBYTES)) == [PathKnown(known)]
    assert paths(desk) == [known]
    assert desk.feed(ProofArrived(desk.now, SOURCE, SLOT_NBYTES)) == [], "nobody asked for these"


def test_a_probe_is_answered_with_a_slot_at_most() -> None:
    desk = proving()
    desk.join_fetcher("relay-n1")
    assert desk.say("fetcher:relay-n1", kv.KvProbe(64)) == [SendProof("fetcher:relay-n1", 64)]
    desk.say("fetcher:relay-n1", kv.KvProbe(1 << 60))
    assert desk.actions == [SendProof("fetcher:relay-n1", SLOT_NBYTES)]
    desk.say("fetcher:relay-n1", kv.KvProbe(-1))
    assert desk.actions == [SendProof("fetcher:relay-n1", 0)]


def test_a_relay_that_was_restarted_or_lost_is_asked_again_or_told() -> None:
    desk = proving()
    desk.say(SOURCE, worker.HelloWanted())
    assert len(desk.sent(SOURCE, kv.KvProbe)) == 1
    desk.lose(SOURCE)
    (path,) = paths(desk)
    assert "cannot be reached" in path.reason


def test_an_owners_pool_is_read() -> None:
    desk = proving()
    hello(desk)
    assert ProvePool("prefill-0", POOL) in desk.actions
    assert desk.feed(PoolProved(desk.now, "prefill-0", 1e9, None)) == [
        PathKnown(kv.PathInfo("prefill-0", "shm", 1e9))
    ]
    desk.lose("worker:prefill-0")
    assert [path.source for path in paths(desk)] == ["n1"]
    assert desk.feed(PoolProved(desk.now, "prefill-0", 1e9, None)) == [], "it is gone"


@pytest.mark.parametrize(("sources", "used"), [(("n1",), "shm"), (("n0", "n1"), "tcp")])
def test_a_pool_that_cannot_be_read_is_told_and_goes_by_tcp_where_it_can(
    sources: tuple[str, ...], used: str
) -> None:
    desk = proving(sources=sources)
    hello(desk)
    desk.feed(PoolProved(desk.now, "prefill-0", 0.0, GONE))
    assert desk.actions == [PathKnown(kv.PathInfo("prefill-0", used, reason=GONE.message))]
    desk.join("decode-0")
    handle = make_handle()
    desk.say("worker:prefill-0", kv.KvOffer(handle))
    desk.say("worker:decode-0", kv.KvPull(handle))
    by_tcp = bool(desk.sent("relay:n0", kv.KvFetch))
    assert by_tcp == (used == "tcp")
    assert bool(desk.sent("worker:decode-0", kv.KvGrant)) != by_tcp


def test_nothing_is_tried_where_nobody_asks_for_it() -> None:
    desk = Desk()
    hello(desk)
    assert not [action for action in desk.actions if isinstance(action, ProvePool)]
    assert paths(desk) == []
