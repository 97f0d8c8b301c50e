"""Transfers that reach a node: slots, order, losses, deadlines, nonsense."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsrelay.events import ChunkArrived, StoreChunk
from dswire.errors import Cancelled, KvCorrupt
from dswire.machine import Send
from dswire.messages import kv, worker
from dswire.messages.kv import Chunk
from support.handles import LAYOUT, make_handle
from support.relay_desk import CHUNKS, LEASE_S, SLOT_NBYTES, TIMEOUT_S, Desk, failure, make_config

DECODE, SOURCE = "worker:decode-0", "relay:n1"
SIZE = LAYOUT.block_nbytes
HERE = make_handle()
THERE = make_handle("r2/0", node="n1", blocks=(4, 3, 2, 1, 0))


@pytest.fixture
def fetcher() -> Desk:
    """Has one decode instance that pulls five blocks from n1."""
    desk = Desk()
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(THERE))
    return desk


def bring(desk: Desk, index: int) -> None:
    desk.chunk(SOURCE, THERE.key, CHUNKS[index], CHUNKS[index].count * SIZE)


def test_chunks_go_by_slots_to_the_reader(fetcher: Desk) -> None:
    assert fetcher.sent(SOURCE, kv.KvFetch) == [kv.KvFetch(THERE.key, 3, SLOT_NBYTES)]
    bring(fetcher, 0)
    ready = Send(DECODE, kv.KvChunkReady(THERE.key, CHUNKS[0], 4))
    assert fetcher.actions == [StoreChunk(4), ready]
    for index in range(3):
        if index:
            bring(fetcher, index)
        fetcher.say(DECODE, kv.KvTaken(THERE.key, CHUNKS[index]))
    assert fetcher.state.incoming.slots.held == 0
    fetcher.say(DECODE, kv.KvPulled(THERE.key))
    assert fetcher.sent(SOURCE, kv.KvFetched) == [kv.KvFetched(THERE.key)]
    fetcher.assert_idle()


def test_a_taken_chunk_gives_a_credit_while_more_are_to_come() -> None:
    desk = Desk(make_config(receiving=2))
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(THERE))
    assert desk.sent(SOURCE, kv.KvFetch)[0].credits == 2
    bring(desk, 0)
    desk.say(DECODE, kv.KvTaken(THERE.key, CHUNKS[0]))
    assert desk.sent(SOURCE, kv.KvCredit) == [kv.KvCredit(THERE.key)]
    bring(desk, 1)
    desk.say(DECODE, kv.KvTaken(THERE.key, CHUNKS[1]))
    assert desk.sent(SOURCE, kv.KvCredit) == []


def test_pulls_wait_for_slots_in_order() -> None:
    desk = Desk(make_config(receiving=3))
    desk.join("decode-0")
    for name in ("a/0", "b/0", "c/0"):
        desk.say(DECODE, kv.KvPull(make_handle(name, node="n1", blocks=range(5))))
        assert len(desk.sent(SOURCE, kv.KvFetch)) == (name == "a/0")
    desk.say(DECODE, kv.KvAbort(KvKey("a/0", 0)))
    assert [fetch.key.sequence for fetch in desk.sent(SOURCE, kv.KvFetch)] == ["b/0"]
    assert desk.sent(SOURCE, kv.KvFetched)[0].error == Cancelled("the sequence was aborted").info()
    desk.say(DECODE, kv.KvAbort(KvKey("c/0", 0)))
    told = [Send(DECODE, kv.KvCancelled(KvKey("c/0", 0), "freed"))]
    assert desk.actions == told, "the other side never heard of it"


def test_a_transfer_gets_more_slots_as_they_become_free() -> None:
    desk = Desk(make_config(receiving=4))
    desk.join("decode-0")
    for name in ("a/0", "b/0"):
        desk.say(DECODE, kv.KvPull(make_handle(name, node="n1", blocks=range(5))))
    assert desk.sent(SOURCE, kv.KvFetch)[0].credits == 1
    desk.say(DECODE, kv.KvAbort(KvKey("a/0", 0)))
    assert desk.sent(SOURCE, kv.KvCredit) == [kv.KvCredit(KvKey("b/0", 0))] * 2


@pytest.mark.parametrize(
    ("chunk", "nbytes", "code"),
    [
        (Chunk(0, 0, 2), 2 * SIZE - 1, "kv_corrupt"),
        (Chunk(0, 0, 2), 0, "kv_corrupt"),
        (Chunk(1, 2, 2), 2 * SIZE, "transfer_failed"),
        (Chunk(0, 1, 2), 2 * SIZE, "transfer_failed"),
        (Chunk(0, 0, 0), 0, "transfer_failed"),
        (Chunk(0, 0, -1), SIZE, "transfer_failed"),
        (Chunk(0, 0, 3), 3 * SIZE, "transfer_failed"),
    ],
    ids=["short", "no frame", "index", "gap", "empty", "negative", "too large"],
)
def test_a_wrong_chunk_fails_that_pull_alone(fetcher: Desk, chunk: Chunk, nbytes: int, code: str) -> None:
    other = make_handle("other/0", node="n1", blocks=(0,))
    fetcher.say(DECODE, kv.KvPull(other))
    fetcher.chunk(SOURCE, THERE.key, chunk, nbytes)
    assert failure(fetcher, DECODE) == code
    assert not any(isinstance(action, StoreChunk) for action in fetcher.actions)
    (fetched,) = fetcher.sent(SOURCE, kv.KvFetched)
    assert fetched.error is not None
    assert fetched.error.code == code
    assert list(fetcher.state.incoming.transfers) == [other.key]


def test_a_duplicate_chunk_fails_the_pull(fetcher: Desk) -> None:
    bring(fetcher, 0)
    bring(fetcher, 0)
    assert failure(fetcher, DECODE) == "transfer_failed"
    fetcher.assert_idle()


def test_a_chunk_without_a_credit_fails_the_pull() -> None:
    desk = Desk(make_config(receiving=1))
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(THERE))
    bring(desk, 0)
    bring(desk, 1)
    assert failure(desk, DECODE) == "protocol_error"


def test_chunks_that_nobody_waits_for_are_dropped(fetcher: Desk) -> None:
    fetcher.chunk(SOURCE, KvKey("nobody/0", 0), CHUNKS[0], 2 * SIZE)
    assert fetcher.actions == []
    fetcher.chunk("relay:n2", THERE.key, CHUNKS[0], 2 * SIZE)
    assert fetcher.actions == [], "it comes from the wrong relay"


@pytest.mark.parametrize(
    ("before", "says"), [(0, "nothing came from node n1"), (1, "worker:decode-0 did not take")]
)
def test_a_fetch_that_stands_still_fails(fetcher: Desk, before: int, says: str) -> None:
    for index in range(before):
        bring(fetcher, index)
    fetcher.pass_time(TIMEOUT_S, alive=("decode-0",))
    (failed,) = fetcher.sent(DECODE, kv.KvFailed)
    assert failed.error.code == "transfer_failed"
    assert says in failed.error.message
    assert len(fetcher.sent(SOURCE, kv.KvFetched)) == 1
    fetcher.assert_idle()


def test_a_pull_that_never_finds_a_slot_fails() -> None:
    desk = Desk(make_config(receiving=1))
    desk.join("decode-0")
    long, late = make_handle("long/0", node="n1", blocks=range(14)), make_handle("late/0", node="n1")
    desk.say(DECODE, kv.KvPull(long))
    desk.say(DECODE, kv.KvPull(late))
    for index in range(6):
        chunk = Chunk(index, 2 * index, 2)
        desk.chunk(SOURCE, long.key, chunk, 2 * SIZE)
        desk.say(DECODE, kv.KvTaken(long.key, chunk))
        desk.say(DECODE, kv.KvExtend(((late.key, "n1"),)))
        desk.pass_time(LEASE_S / 6, alive=("decode-0",))
    (failed,) = desk.sent(DECODE, kv.KvFailed)
    assert (failed.key, "no staging slot became free" in failed.error.message) == (late.key, True)
    assert list(desk.state.incoming.transfers) == [long.key]


def test_the_error_of_the_other_side_reaches_the_reader(fetcher: Desk) -> None:
    fetcher.say(SOURCE, kv.KvFetchFailed(THERE.key, KvCorrupt("rotten").info()))
    assert failure(fetcher, DECODE) == "kv_corrupt"
    fetcher.assert_idle()


def test_what_an_earlier_fetch_left_on_the_way_is_dropped(fetcher: Desk) -> None:
    bring(fetcher, 0)
    fetcher.say(DECODE, kv.KvAbort(THERE.key))
    fetcher.say(DECODE, kv.KvPull(THERE))
    assert fetcher.sent(SOURCE, kv.KvFetch) == [kv.KvFetch(THERE.key, 3, SLOT_NBYTES, number=1)]
    bring(fetcher, 1)
    assert fetcher.actions == []
    fetcher.say(SOURCE, kv.KvFetchFailed(THERE.key, KvCorrupt("rotten").info()))
    assert fetcher.actions == []
    fetcher.feed(ChunkArrived(fetcher.now, SOURCE, THERE.key, CHUNKS[0], CHUNKS[0].count * SIZE, 1))
    assert [ready.chunk for ready in fetcher.sent(DECODE, kv.KvChunkReady)] == [CHUNKS[0]]


def test_an_unreachable_relay_fails_its_pulls(fetcher: Desk) -> None:
    fetcher.lose(SOURCE)
    assert failure(fetcher, DECODE) == "transfer_failed"
    fetcher.assert_idle()


def test_a_restarted_relay_is_asked_again_where_nothing_has_come(fetcher: Desk) -> None:
    other = make_handle("other/0", node="n1", blocks=(0,))
    fetcher.say(DECODE, kv.KvPull(other))
    bring(fetcher, 0)
    fetcher.say(SOURCE, worker.HelloWanted())
    assert len(fetcher.sent(SOURCE, kv.RelayHello)) == 1
    assert [fetch.key for fetch in fetcher.sent(SOURCE, kv.KvFetch)] == [other.key]
    assert failure(fetcher, DECODE) == "transfer_failed", "the one in mid-transfer"
    fetcher.say(SOURCE, worker.HelloWanted())
    assert fetcher.sent(SOURCE, kv.KvFetch) == [], "once is enough"


def test_a_lost_reader_ends_its_fetches(fetcher: Desk) -> None:
    fetcher.lose(DECODE)
    (fetched,) = fetcher.sent(SOURCE, kv.KvFetched)
    assert fetched.error is not None
    fetcher.assert_idle()


def test_the_readers_verdict_is_passed_on(fetcher: Desk) -> None:
    error = KvCorrupt("flipped").info()
    fetcher.say(DECODE, kv.KvPulled(THERE.key, error))
    assert fetcher.sent(SOURCE, kv.KvFetched) == [kv.KvFetched(THERE.key, error)]
    fetcher.assert_idle()


@pytest.mark.parametrize(
    ("node", "size", "says"),
    [("n7", SLOT_NBYTES, "no transport leads"), ("n1", SIZE - 1, "does not fit a staging slot")],
)
def test_a_pull_that_cannot_be_is_refused(node: str, size: int, says: str) -> None:
    desk = Desk(make_config(slot_nbytes=size))
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(make_handle(node=node)))
    (failed,) = desk.sent(DECODE, kv.KvFailed)
    assert says in failed.error.message
    desk.assert_idle()


def test_a_second_reader_of_the_same_fetch_is_refused(fetcher: Desk) -> None:
    fetcher.join("decode-1")
    fetcher.say("worker:decode-1", kv.KvPull(THERE))
    assert len(fetcher.sent("worker:decode-1", kv.KvFailed)) == 1
    fetcher.say(DECODE, kv.KvPull(THERE))
    assert fetcher.sent(DECODE, kv.KvFailed) == []
    assert len(fetcher.state.incoming.transfers) == 1


def test_wanted_handles_of_other_nodes_are_told_there(fetcher: Desk) -> None:
    fetcher.say(DECODE, kv.KvExtend(((THERE.key, "n1"), (HERE.key, "n0"), (HERE.key, "n7"))))
    assert fetcher.actions == [Send(SOURCE, kv.KvExtend(((THERE.key, "n1"),)))]


def test_a_reader_that_wants_it_no_more_is_given_up_after_a_lease(fetcher: Desk) -> None:
    waiting = make_handle("r3/0", node="n1", blocks=(0, 1, 2, 3, 4))
    bring(fetcher, 0)
    fetcher.say(DECODE, kv.KvPull(waiting))
    for _ in range(5):
        fetcher.say(DECODE, kv.KvExtend(((waiting.key, "n1"),)))
        assert fetcher.sent(SOURCE, kv.KvExtend) == [kv.KvExtend(((waiting.key, "n1"),))]
        fetcher.pass_time(LEASE_S / 6, alive=("decode-0",))
    assert THERE.key not in fetcher.state.incoming.transfers
    fetcher.pass_time(LEASE_S, alive=("decode-0",))
    fetcher.assert_idle()
