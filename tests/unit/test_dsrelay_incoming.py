"""Transfers that reach a node: tickets, losses, deadlines, nonsense."""

from __future__ import annotations

import pytest

from dskv.handle import KvHandle
from dswire.errors import Cancelled, KvCorrupt
from dswire.machine import Send
from dswire.messages import kv, worker
from support.handles import make_handle
from support.relay_desk import LEASE_S, TICKET, TIMEOUT_S, Desk, failure

DECODE, SOURCE = "worker:decode-0", "relay:n1"
READER = "decode-0/1"
HERE = make_handle()
THERE = make_handle("r2/0", node="n1", blocks=(4, 3, 2, 1, 0))


@pytest.fixture
def fetcher() -> Desk:
    """Has one decode instance that pulls from n1."""
    desk = Desk()
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(THERE))
    return desk


def grant(desk: Desk, handle: KvHandle = THERE, number: int = 1) -> None:
    desk.say(SOURCE, kv.KvFetchGranted(handle.key, TICKET, number))


def test_the_reader_gets_a_ticket(fetcher: Desk) -> None:
    assert fetcher.sent(SOURCE, kv.KvFetch) == [kv.KvFetch(THERE.key, 1, READER)]
    grant(fetcher)
    assert fetcher.actions == [Send(DECODE, kv.KvGrant(THERE.key, TICKET))]
    grant(fetcher)
    assert fetcher.actions == [], "once is enough"
    fetcher.say(DECODE, kv.KvPulled(THERE.key))
    assert fetcher.sent(SOURCE, kv.KvFetched) == [kv.KvFetched(THERE.key)]
    fetcher.assert_idle()


@pytest.mark.parametrize("granted", [False, True])
def test_an_abort_ends_the_fetch(fetcher: Desk, granted: bool) -> None:
    if granted:
        grant(fetcher)
    fetcher.say(DECODE, kv.KvAbort(THERE.key))
    assert fetcher.sent(SOURCE, kv.KvFetched)[0].error == Cancelled("the sequence was aborted").info()
    assert fetcher.sent(DECODE, kv.KvCancelled) == [kv.KvCancelled(THERE.key, "freed")]
    fetcher.assert_idle()


def test_what_was_wrong_gets_another_ticket_once(fetcher: Desk) -> None:
    fetcher.say(DECODE, kv.KvAgain(THERE.key))
    assert failure(fetcher, DECODE) == "transfer_failed", "there was no ticket yet"
    grant(fetcher)
    fetcher.say(DECODE, kv.KvAgain(THERE.key))
    assert fetcher.sent(SOURCE, kv.KvFetch) == [kv.KvFetch(THERE.key, 2, READER)]
    grant(fetcher, number=2)
    assert fetcher.sent(DECODE, kv.KvGrant) == [kv.KvGrant(THERE.key, TICKET)]
    fetcher.say(DECODE, kv.KvAgain(THERE.key))
    assert failure(fetcher, DECODE) == "transfer_failed"


def test_tickets_that_nobody_waits_for_are_dropped(fetcher: Desk) -> None:
    grant(fetcher, HERE)
    assert fetcher.actions == []
    fetcher.say("relay:n2", kv.KvFetchGranted(THERE.key, TICKET, 1))
    assert fetcher.actions == [], "it comes from the wrong relay"


def test_a_fetch_that_is_not_answered_fails(fetcher: Desk) -> None:
    fetcher.pass_time(TIMEOUT_S, alive=("decode-0",))
    (failed,) = fetcher.sent(DECODE, kv.KvFailed)
    assert failed.error.code == "transfer_failed"
    assert "nothing came from node n1" in failed.error.message
    assert len(fetcher.sent(SOURCE, kv.KvFetched)) == 1
    fetcher.assert_idle()


def test_the_error_of_the_other_side_reaches_the_reader(fetcher: Desk) -> None:
    fetcher.say(SOURCE, kv.KvFetchFailed(THERE.key, KvCorrupt("rotten").info(), 1))
    assert failure(fetcher, DECODE) == "kv_corrupt"
    fetcher.assert_idle()


def test_what_an_earlier_fetch_left_on_the_way_is_dropped(fetcher: Desk) -> None:
    fetcher.say(DECODE, kv.KvAbort(THERE.key))
    fetcher.say(DECODE, kv.KvPull(THERE))
    assert fetcher.sent(SOURCE, kv.KvFetch) == [kv.KvFetch(THERE.key, 2, READER)]
    grant(fetcher)
    assert fetcher.actions == []
    fetcher.say(SOURCE, kv.KvFetchFailed(THERE.key, KvCorrupt("rotten").info(), 1))
    assert fetcher.actions == []
    grant(fetcher, number=2)
    assert fetcher.sent(DECODE, kv.KvGrant) == [kv.KvGrant(THERE.key, TICKET)]


def test_an_unreachable_relay_fails_its_pulls(fetcher: Desk) -> None:
    fetcher.lose(SOURCE)
    assert failure(fetcher, DECODE) == "transfer_failed"
    fetcher.assert_idle()


def test_a_restarted_relay_is_asked_again_where_no_ticket_has_come(fetcher: Desk) -> None:
    other = make_handle("other/0", node="n1", blocks=(0,))
    fetcher.say(DECODE, kv.KvPull(other))
    grant(fetcher)
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


def test_a_pull_that_cannot_be_is_refused() -> None:
    desk = Desk()
    desk.join("decode-0")
    desk.say(DECODE, kv.KvPull(make_handle(node="n7")))
    (failed,) = desk.sent(DECODE, kv.KvFailed)
    assert "no transport leads" in failed.error.message
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
    wanted = make_handle("r3/0", node="n1", blocks=(0, 1, 2, 3, 4))
    grant(fetcher)
    fetcher.say(DECODE, kv.KvPull(wanted))
    grant(fetcher, wanted, 2)
    for _ in range(6):
        fetcher.say(DECODE, kv.KvExtend(((wanted.key, "n1"),)))
        assert fetcher.sent(SOURCE, kv.KvExtend) == [kv.KvExtend(((wanted.key, "n1"),))]
        fetcher.pass_time(LEASE_S / 6, alive=("decode-0",))
    assert list(fetcher.state.incoming.transfers) == [wanted.key]
    fetcher.pass_time(LEASE_S, alive=("decode-0",))
    fetcher.assert_idle()
