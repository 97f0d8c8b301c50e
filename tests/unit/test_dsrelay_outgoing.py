"""Transfers that leave a node: streams are opened and closed, losses, deadlines, nonsense."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsrelay.events import CloseStream, OpenStream
from dswire.errors import Cancelled
from dswire.messages import PROTOCOL, kv, worker
from support.handles import make_handle
from support.relay_desk import LEASE_S, Desk, failure

PREFILL, FETCHER = "worker:prefill-0", "fetcher:relay-n1"
HERE = make_handle(blocks=(0, 1, 2, 3, 4))


@pytest.fixture
def sender() -> Desk:
    """Has one offer; a relay that may fetch is known."""
    desk = Desk()
    desk.join("prefill-0")
    desk.join_fetcher("relay-n1")
    desk.say(PREFILL, kv.KvOffer(HERE))
    return desk


def fetch(desk: Desk, *, key: KvKey = HERE.key, number: int = 1) -> None:
    desk.say(FETCHER, kv.KvFetch(key, number))


def test_a_fetch_opens_a_stream_and_its_end_closes_it(sender: Desk) -> None:
    fetch(sender)
    assert sender.actions == [OpenStream(FETCHER, HERE, 1)]
    sender.say(FETCHER, kv.KvFetched(HERE.key))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "pulled")]
    sender.assert_idle()


def test_a_fetch_before_its_offer_is_held(sender: Desk) -> None:
    late = make_handle("late/0")
    fetch(sender, key=late.key)
    assert sender.actions == []
    sender.say(PREFILL, kv.KvOffer(late))
    assert sender.actions == [OpenStream(FETCHER, late, 1)]
    fetch(sender, key=KvKey("never/0", 0))
    sender.pass_time(2.0)
    assert failure(sender, FETCHER) == "transfer_failed"


def test_a_repeated_fetch_changes_nothing_and_a_later_one_begins_anew(sender: Desk) -> None:
    fetch(sender)
    fetch(sender)
    assert sender.actions == []
    fetch(sender, number=2)
    assert sender.actions == [CloseStream(HERE.key), OpenStream(FETCHER, HERE, 2)]


def test_a_later_fetch_of_what_is_not_offered_yet_takes_the_place_of_the_first(sender: Desk) -> None:
    late = make_handle("late/0")
    fetch(sender, key=late.key)
    fetch(sender, key=late.key, number=2)
    sender.say(PREFILL, kv.KvOffer(late))
    assert sender.actions == [OpenStream(FETCHER, late, 2)]


def test_an_abort_closes_the_stream(sender: Desk) -> None:
    fetch(sender)
    sender.say(FETCHER, kv.KvFetched(HERE.key, Cancelled("no more").info()))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "aborted")]
    sender.assert_idle()


def test_a_restarted_owner_ends_its_streams(sender: Desk) -> None:
    fetch(sender)
    sender.join("prefill-0", "2")
    assert failure(sender, FETCHER) == "transfer_failed"
    sender.assert_idle()


def test_a_verdict_that_never_comes_is_bounded_by_the_lease(sender: Desk) -> None:
    fetch(sender)
    sender.pass_time(2 * LEASE_S, alive=("prefill-0",))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "expired")]
    sender.assert_idle()


@pytest.mark.parametrize("how", ["restarted", "lost"])
def test_a_fetching_relay_that_is_gone_releases(sender: Desk, how: str) -> None:
    fetch(sender)
    fetch(sender, key=KvKey("waits/0", 0))
    if how == "lost":
        sender.lose(FETCHER)
    else:
        sender.join_fetcher("relay-n1", "2")
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "lost")]
    sender.assert_idle()


def test_a_withdrawn_handle_is_quarantined_until_the_fetch_ends(sender: Desk) -> None:
    fetch(sender)
    sender.say(PREFILL, kv.KvWithdraw(HERE.key))
    assert sender.state.ledger.counts() == {"quarantined": 1}
    sender.say(FETCHER, kv.KvFetched(HERE.key))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "withdrawn")]


def test_an_unknown_relay_is_asked_for_its_hello_and_one_of_another_version_refused(sender: Desk) -> None:
    stranger = "fetcher:relay-n2"
    sender.say(stranger, kv.KvFetch(HERE.key))
    assert sender.sent(stranger, worker.HelloWanted) == [worker.HelloWanted()]
    sender.say(stranger, kv.RelayHello(PROTOCOL + 1, "relay-n2", "1"))
    sender.say(stranger, kv.KvFetch(HERE.key))
    assert failure(sender, stranger) == "version_mismatch"


def test_a_lease_is_extended_from_the_other_node(sender: Desk) -> None:
    sender.pass_time(LEASE_S - 1, alive=("prefill-0",))
    sender.say(FETCHER, kv.KvExtend(((HERE.key, "n0"),)))
    sender.pass_time(LEASE_S - 1, alive=("prefill-0",))
    assert sender.state.ledger.counts() == {"ready": 1}
