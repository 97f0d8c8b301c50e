"""Hand-offs by communicators: one at a time for each reader and each owner, whatever ends in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dskv.handle import KvHandle, KvKey
from dsrelay.turns import Turns
from dswire.errors import Cancelled, TransferFailed
from dswire.machine import Send
from dswire.messages import kv
from support.handles import make_handle
from support.relay_desk import LEASE_S, TIMEOUT_S, Desk, failure, make_config

PREFILL, DECODE, FETCHER, SOURCE = "worker:prefill-0", "worker:decode-0", "fetcher:relay-n1", "relay:n1"
ONE, TWO = make_handle("r1/0"), make_handle("r2/0")


def owners_side() -> Desk:
    desk = Desk(make_config(collective="gloo"))
    desk.join("prefill-0")
    desk.join_fetcher("relay-n1")
    for handle in (ONE, TWO):
        desk.say(PREFILL, kv.KvOffer(handle))
    return desk


def readers_side() -> Desk:
    desk = Desk(make_config(collective="gloo"))
    desk.join("decode-0")
    return desk


def there(name: str) -> KvHandle:
    return make_handle(name, node="n1")


def test_an_owner_is_asked_to_send_and_its_meeting_is_the_ticket() -> None:
    desk = owners_side()
    desk.say(FETCHER, kv.KvFetch(ONE.key, 1, "decode-0/9"))
    assert desk.actions == [Send(PREFILL, kv.KvSend(ONE.key, "decode-0/9", 1))]
    desk.say(PREFILL, kv.KvSending(ONE.key, 1, "10.0.0.1:9/x"))
    ticket = kv.Ticket(b"", meeting="10.0.0.1:9/x")
    assert desk.actions == [Send(FETCHER, kv.KvFetchGranted(ONE.key, ticket, 1))]
    desk.say(FETCHER, kv.KvFetched(ONE.key))
    assert desk.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(ONE.key, "pulled")]


def test_an_owner_sends_one_at_a_time() -> None:
    desk = owners_side()
    desk.say(FETCHER, kv.KvFetch(ONE.key, 1, "a"))
    desk.say(FETCHER, kv.KvFetch(TWO.key, 2, "b"))
    assert desk.actions == []
    desk.say(PREFILL, kv.KvSending(TWO.key, 2, "too early"))
    assert desk.actions == []
    desk.say(FETCHER, kv.KvFetched(ONE.key, Cancelled("no more").info()))
    assert desk.sent(PREFILL, kv.KvSend) == [kv.KvSend(TWO.key, "b", 2)]
    desk.say(FETCHER, kv.KvFetched(TWO.key))
    desk.assert_idle()


def test_an_owner_that_cannot_be_met_fails_the_fetch() -> None:
    desk = owners_side()
    desk.say(FETCHER, kv.KvFetch(ONE.key, 1, "a"))
    desk.say(PREFILL, kv.KvSending(ONE.key, 1, error=TransferFailed("no port").info()))
    assert failure(desk, FETCHER) == "transfer_failed"
    assert desk.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(ONE.key, "lost")]


def test_what_was_wrong_is_sent_again() -> None:
    desk = owners_side()
    desk.say(FETCHER, kv.KvFetch(ONE.key, 1, "a"))
    desk.say(FETCHER, kv.KvFetch(ONE.key, 2, "a"))
    assert desk.actions == [Send(PREFILL, kv.KvSend(ONE.key, "a", 2))]
    desk.say(PREFILL, kv.KvSending(ONE.key, 1, "of the first"))
    assert desk.actions == []


def test_a_reader_fetches_one_at_a_time() -> None:
    desk = readers_side()
    for name in ("a/0", "b/0", "c/0"):
        desk.say(DECODE, kv.KvPull(there(name)))
        assert len(desk.sent(SOURCE, kv.KvFetch)) == (name == "a/0")
    desk.say(DECODE, kv.KvAbort(KvKey("b/0", 0)))
    assert desk.sent(SOURCE, kv.KvFetched) == [], "the other side never heard of it"
    desk.say(DECODE, kv.KvPulled(KvKey("a/0", 0)))
    assert [fetch.key.sequence for fetch in desk.sent(SOURCE, kv.KvFetch)] == ["c/0"]
    desk.say(DECODE, kv.KvPulled(KvKey("c/0", 0)))
    desk.assert_idle()


def test_who_waits_for_its_turn_is_bounded_by_the_lease_alone() -> None:
    desk = readers_side()
    for name in ("a/0", "b/0"):
        desk.say(DECODE, kv.KvPull(there(name)))
    desk.pass_time(TIMEOUT_S + 1, alive=("decode-0",))
    assert desk.sent(DECODE, kv.KvFailed) == []
    desk.pass_time(LEASE_S, alive=("decode-0",))
    assert {one.error.code for one in desk.sent(DECODE, kv.KvFailed)} == {"transfer_failed"}
    desk.assert_idle()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=40))
def test_turns_come_in_order_and_one_has_one(steps: list[tuple[bool, int]]) -> None:
    turns, queue = Turns(), list[int]()
    for takes, number in steps:
        key = KvKey(f"r{number}/0", 0)
        if takes and number not in queue:
            queue.append(number)
            assert turns.take("x", key) == (queue[0] == number)
        elif not takes:
            had = bool(queue) and queue[0] == number
            if number in queue:
                queue.remove(number)
            given_to = turns.give("x", key)
            assert given_to == (KvKey(f"r{queue[0]}/0", 0) if had and queue else None)
        assert turns.waiting == len(queue)
        assert all(turns.has("x", KvKey(f"r{one}/0", 0)) == (one == queue[0]) for one in queue)
