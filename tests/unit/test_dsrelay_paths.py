"""Every path to a node is tried before it is needed, and told with its rate or with what is wrong."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from dskv.shards import GpuMemory
from dsrelay.events import OpenProof, PathKnown, PoolProved, ProvePool, ProveStream, StreamProved
from dswire.errors import TransferFailed
from dswire.machine import Send
from dswire.messages import PROTOCOL, kv, worker
from support.handles import LAYOUT, whole
from support.relay_desk import TICKET, Desk, make_config

SOURCE = "relay:n1"
FETCHER = "fetcher:relay-n1"
PROOF = kv.KvProof(TICKET, 1 << 20)
POOL = kv.PoolInfo(LAYOUT, whole("/pool"), 16)
GONE = TransferFailed("/pool: cannot be mapped: No such file or directory").info()


def proving(*, sources: tuple[str, ...] = ("n1",)) -> Desk:
    return Desk(replace(make_config(sources=sources), prove=True))


def paths(desk: Desk) -> list[kv.PathInfo]:
    desk.say("worker:anybody", kv.KvList())
    (listing,) = desk.sent("worker:anybody", kv.KvListing)
    return list(listing.paths)


def hello(desk: Desk, pool: kv.PoolInfo = POOL) -> None:
    desk.say("worker:prefill-0", kv.KvHello(PROTOCOL, "prefill-0", "1", pool))


def test_another_relay_is_asked_for_a_ticket_and_its_bytes_are_read() -> None:
    desk = proving()
    assert desk.sent(SOURCE, kv.KvProbe) == [kv.KvProbe()]
    assert paths(desk) == [kv.PathInfo("n1", "tcp")]
    assert desk.say(SOURCE, PROOF) == [ProveStream("n1", PROOF)]
    assert desk.say(SOURCE, PROOF) == [], "nobody asked for this one"
    known = kv.PathInfo("n1", "tcp", 2e9)
    assert desk.feed(StreamProved(desk.now, "n1", 2e9, None)) == [PathKnown(known)]
    assert paths(desk) == [known]


def test_a_stream_that_cannot_be_had_is_told() -> None:
    desk = proving()
    desk.say(SOURCE, PROOF)
    told = kv.PathInfo("n1", "tcp", reason=GONE.message)
    assert desk.feed(StreamProved(desk.now, "n1", 0.0, GONE)) == [PathKnown(told)]


def test_a_probe_is_answered_with_a_ticket() -> None:
    desk = proving()
    desk.join_fetcher("relay-n1")
    assert desk.say(FETCHER, kv.KvProbe()) == [OpenProof(FETCHER)]


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


def test_a_pool_that_cannot_be_read_is_told() -> None:
    desk = proving()
    hello(desk)
    desk.feed(PoolProved(desk.now, "prefill-0", 0.0, GONE))
    assert desk.actions == [PathKnown(kv.PathInfo("prefill-0", "shm", reason=GONE.message))]


def test_nothing_is_tried_where_nobody_asks_for_it() -> None:
    desk = Desk()
    hello(desk)
    assert not [action for action in desk.actions if isinstance(action, ProvePool)]
    assert paths(desk) == []


def gpu_pool(handle: bytes = b"1") -> kv.PoolInfo:
    gpu = GpuMemory("GPU-1", handle, 1, 0, b"", 0, b"", False)
    return msgspec.structs.replace(POOL, shards=tuple(msgspec.structs.replace(one, gpu=gpu) for one in POOL.shards))


def greet(desk: Desk, name: str) -> None:
    desk.say(f"worker:{name}", kv.KvHello(PROTOCOL, name, "1"))


def test_the_pool_of_a_gpu_is_read_by_the_readers() -> None:
    desk = proving()
    greet(desk, "decode-0")
    hello(desk, gpu_pool())
    assert not [action for action in desk.actions if isinstance(action, ProvePool)]
    assert desk.sent("worker:decode-0", kv.KvTry) == [kv.KvTry("prefill-0", gpu_pool())]
    assert kv.PathInfo("prefill-0", "cuda_ipc") in paths(desk)
    # whoever comes later tries what is there
    greet(desk, "decode-1")
    assert desk.sent("worker:decode-1", kv.KvTry) == [kv.KvTry("prefill-0", gpu_pool())]
    known = kv.PathInfo("prefill-0", "cuda_ipc", 2e9)
    assert desk.say("worker:decode-0", kv.KvTried("prefill-0", 2e9)) == [PathKnown(known)]
    assert known in paths(desk)


def test_one_reader_that_cannot_open_a_gpus_pool_is_told() -> None:
    desk = proving()
    hello(desk, gpu_pool())
    greet(desk, "decode-0")
    greet(desk, "decode-1")
    told = kv.PathInfo("prefill-0", "cuda_ipc", reason=GONE.message)
    assert desk.say("worker:decode-0", kv.KvTried("prefill-0", error=GONE)) == [PathKnown(told)]
    assert desk.say("worker:decode-1", kv.KvTried("prefill-0", 2e9)) == []
    assert told in paths(desk)
    # its next life is another matter
    desk.lose("worker:prefill-0")
    assert told not in paths(desk)
    assert desk.say("worker:decode-0", kv.KvTried("prefill-0", 1e9)) == [], "it is gone"
    hello(desk, gpu_pool(b"2"))
    assert desk.sent("worker:decode-1", kv.KvTry)[-1].pool == gpu_pool(b"2")


def test_a_reader_that_is_gone_tries_nothing() -> None:
    desk = proving()
    greet(desk, "decode-0")
    desk.lose("worker:decode-0")
    hello(desk, gpu_pool())
    assert desk.sent("worker:decode-0", kv.KvTry) == []


# communicators


def meeting(*, sources: tuple[str, ...] = ("n1",)) -> Desk:
    return Desk(replace(make_config(sources=sources, direct=False, collective="gloo"), prove=True))


def test_each_reader_meets_the_owners_of_other_nodes() -> None:
    desk = meeting()
    assert desk.sent(SOURCE, kv.KvProbe) == [], "there is nobody to meet them"
    greet(desk, "decode-0")
    assert desk.sent(SOURCE, kv.KvProbe) == [kv.KvProbe("decode-0")]
    assert paths(desk) == [], "which owners there are is not known"
    desk.say(SOURCE, kv.KvMet("prefill-0", "decode-0", "10.0.0.1:9/x"))
    assert desk.actions == [Send("worker:decode-0", kv.KvTry("prefill-0", meeting="10.0.0.1:9/x"))]
    assert paths(desk) == [kv.PathInfo("prefill-0", "gloo")]
    known = kv.PathInfo("prefill-0", "gloo", 1e9)
    assert desk.say("worker:decode-0", kv.KvTried("prefill-0", 1e9)) == [PathKnown(known)]
    assert paths(desk) == [known]


def test_the_reader_that_found_an_owner_slowest_is_told() -> None:
    desk = meeting()
    for name in ("decode-0", "decode-1"):
        greet(desk, name)
        desk.say(SOURCE, kv.KvMet("prefill-0", name, "10.0.0.1:9/x"))
    desk.say("worker:decode-0", kv.KvTried("prefill-0", 1e9))
    slow = kv.PathInfo("prefill-0", "gloo", 5e8)
    assert desk.say("worker:decode-1", kv.KvTried("prefill-0", 5e8)) == [PathKnown(slow)]
    # it met the owner's next life
    desk.say(SOURCE, kv.KvMet("prefill-0", "decode-1", "10.0.0.1:10/y"))
    assert desk.say("worker:decode-1", kv.KvTried("prefill-0", 2e9)) == [
        PathKnown(kv.PathInfo("prefill-0", "gloo", 1e9))
    ]


def test_an_owner_that_cannot_be_met_is_told() -> None:
    desk = meeting()
    greet(desk, "decode-0")
    told = kv.PathInfo("prefill-0", "gloo", reason=GONE.message)
    assert desk.say(SOURCE, kv.KvMet("prefill-0", "decode-0", error=GONE)) == [PathKnown(told)]


def test_a_meeting_that_nobody_asked_for_is_for_nobody() -> None:
    desk = meeting()
    assert desk.say(SOURCE, kv.KvMet("prefill-0", "decode-0", "10.0.0.1:9/x")) == []
    greet(desk, "decode-0")
    desk.lose("worker:decode-0")
    assert desk.say(SOURCE, kv.KvMet("prefill-0", "decode-0", "10.0.0.1:9/x")) == []
    assert paths(desk) == []


def test_a_relay_that_was_restarted_is_asked_for_meetings_again() -> None:
    desk = meeting()
    greet(desk, "decode-0")
    desk.say(SOURCE, worker.HelloWanted())
    assert desk.sent(SOURCE, kv.KvProbe) == [kv.KvProbe("decode-0")]


def test_an_owner_is_asked_to_meet_whoever_wants_it() -> None:
    desk = meeting()
    desk.join_fetcher("relay-n1")
    assert desk.say(FETCHER, kv.KvProbe("decode-9")) == []
    hello(desk)
    assert desk.sent("worker:prefill-0", kv.KvMeet) == [kv.KvMeet("decode-9", FETCHER)]
    assert desk.say(FETCHER, kv.KvProbe("decode-8")) == [Send("worker:prefill-0", kv.KvMeet("decode-8", FETCHER))]
    desk.say("worker:prefill-0", kv.KvMeeting("decode-8", FETCHER, "10.0.0.1:9/x"))
    assert desk.actions == [Send(FETCHER, kv.KvMet("prefill-0", "decode-8", "10.0.0.1:9/x"))]


def test_a_relay_that_is_gone_wants_no_meetings() -> None:
    desk = meeting()
    desk.join_fetcher("relay-n1")
    desk.say(FETCHER, kv.KvProbe("decode-9"))
    desk.join_fetcher("relay-n1", "2")
    hello(desk)
    assert desk.sent("worker:prefill-0", kv.KvMeet) == []
    assert desk.say("worker:prefill-0", kv.KvMeeting("decode-9", FETCHER, "10.0.0.1:9/x")) == []
