"""Transfers that leave a node: credits, order, losses, deadlines, nonsense."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsrelay.events import SendChunk
from dswire.errors import Cancelled
from dswire.messages import PROTOCOL, kv, worker
from dswire.messages.kv import Chunk
from support.handles import LAYOUT, make_handle
from support.relay_desk import CHUNKS, LEASE_S, SLOT_NBYTES, TIMEOUT_S, Desk, failure

PREFILL, FETCHER = "worker:prefill-0", "fetcher:relay-n1"
SIZE = LAYOUT.block_nbytes
HERE = make_handle(blocks=(0, 1, 2, 3, 4))


@pytest.fixture
def sender() -> Desk:
    """Has one offer; a relay that may fetch is known."""
    desk = Desk()
    desk.join("prefill-0")
    desk.join_fetcher("relay-n1")
    desk.say(PREFILL, kv.KvOffer(HERE))
    return desk


def staged(desk: Desk, index: int) -> list[SendChunk]:
    desk.say(PREFILL, kv.KvStaged(HERE.key, CHUNKS[index]))
    return [action for action in desk.actions if isinstance(action, SendChunk)]


def stages(desk: Desk) -> list[tuple[Chunk, int]]:
    return [(stage.chunk, stage.slot) for stage in desk.sent(PREFILL, kv.KvStage)]


def fetch(desk: Desk, credits_: int, *, slot_nbytes: int = SLOT_NBYTES, key: KvKey = HERE.key) -> None:
    desk.say(FETCHER, kv.KvFetch(key, credits_, slot_nbytes))


def test_chunks_are_staged_and_sent_as_credits_allow(sender: Desk) -> None:
    fetch(sender, 2)
    assert stages(sender) == [(CHUNKS[0], 0), (CHUNKS[1], 1)]
    assert staged(sender, 0) == [SendChunk(FETCHER, kv.KvChunk(HERE.key, CHUNKS[0]), 0, 2 * SIZE)]
    assert len(staged(sender, 1)) == 1
    assert stages(sender) == []
    sender.say(FETCHER, kv.KvCredit(HERE.key))
    assert stages(sender) == [(CHUNKS[2], 2)]
    assert staged(sender, 2)[0].nbytes == SIZE
    sender.say(FETCHER, kv.KvFetched(HERE.key))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "pulled")]
    sender.assert_idle()


def test_chunks_leave_in_order_however_they_are_staged(sender: Desk) -> None:
    fetch(sender, 4)
    assert staged(sender, 2) == []
    assert staged(sender, 1) == []
    assert [chunk.message.chunk.index for chunk in staged(sender, 0)] == [0, 1, 2]


def test_the_smaller_slot_decides_the_chunks(sender: Desk) -> None:
    fetch(sender, 4, slot_nbytes=SIZE)
    assert [chunk.count for chunk, _ in stages(sender)] == [1, 1, 1, 1]


def test_slots_are_dealt_round_robin(sender: Desk) -> None:
    other = make_handle("r2/0", blocks=(5, 6, 7, 8))
    sender.say(PREFILL, kv.KvOffer(other))
    fetch(sender, 4, slot_nbytes=SIZE)
    fetch(sender, 4, slot_nbytes=SIZE, key=other.key)
    assert stages(sender) == [], "all four slots are taken"
    for _ in range(2):
        sender.say(FETCHER, kv.KvCredit(HERE.key))
    dealt = []
    for index in range(3):
        sender.say(PREFILL, kv.KvStaged(HERE.key, Chunk(index, index, 1)))
        dealt += [stage.key.sequence for stage in sender.sent(PREFILL, kv.KvStage)]
    assert dealt == ["r2/0", "r1/0", "r2/0"]


@pytest.mark.parametrize(("credits_", "slot_nbytes"), [(0, 512), (-1, 512), (1 << 40, 512), (1, 0)])
def test_a_senseless_fetch_is_refused(sender: Desk, credits_: int, slot_nbytes: int) -> None:
    fetch(sender, credits_, slot_nbytes=slot_nbytes)
    assert failure(sender, FETCHER) == "protocol_error"
    assert sender.state.ledger.counts() == {"ready": 1}


def test_a_block_that_fits_no_slot_fails_typed(sender: Desk) -> None:
    fetch(sender, 1, slot_nbytes=SIZE - 1)
    assert failure(sender, FETCHER) == "transfer_failed"
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "lost")]
    sender.assert_idle()


def test_a_fetch_before_its_offer_is_held(sender: Desk) -> None:
    late = make_handle("late/0")
    fetch(sender, 4, key=late.key)
    assert sender.actions == []
    sender.say(PREFILL, kv.KvOffer(late))
    assert len(stages(sender)) == 2
    fetch(sender, 4, key=KvKey("never/0", 0))
    sender.pass_time(2.0)
    assert failure(sender, FETCHER) == "transfer_failed"


def test_a_repeated_fetch_changes_nothing(sender: Desk) -> None:
    fetch(sender, 2)
    fetch(sender, 2)
    assert sender.actions == []


def test_a_slot_under_the_owners_pen_stays_taken_after_an_abort(sender: Desk) -> None:
    fetch(sender, 2)
    sender.say(FETCHER, kv.KvFetched(HERE.key, Cancelled("no more").info()))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "aborted")]
    assert sender.state.outgoing.slots.held == 2
    assert staged(sender, 0) == []
    assert sender.state.outgoing.slots.held == 1
    sender.pass_time(LEASE_S, alive=("prefill-0",))
    sender.assert_idle()


def test_a_restarted_owner_writes_no_more(sender: Desk) -> None:
    fetch(sender, 2)
    sender.join("prefill-0", "2")
    assert failure(sender, FETCHER) == "transfer_failed"
    sender.assert_idle()


def test_only_the_owner_says_what_is_staged(sender: Desk) -> None:
    fetch(sender, 2)
    sender.join("prefill-1")
    sender.say("worker:prefill-1", kv.KvStaged(HERE.key, CHUNKS[0]))
    assert sender.actions == []
    sender.say(PREFILL, kv.KvStaged(HERE.key, Chunk(77, 0, 1)))
    assert sender.actions == []


def test_a_transfer_that_stands_still_is_ended(sender: Desk) -> None:
    fetch(sender, 2)
    sender.pass_time(TIMEOUT_S, alive=("prefill-0",))
    assert failure(sender, FETCHER) == "transfer_failed"
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "lost")]


def test_a_verdict_that_never_comes_is_bounded_by_the_lease(sender: Desk) -> None:
    fetch(sender, 4)
    for index in range(3):
        staged(sender, index)
    sender.pass_time(2 * LEASE_S, alive=("prefill-0",))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "expired")]
    sender.assert_idle()


@pytest.mark.parametrize("how", ["restarted", "lost"])
def test_a_fetching_relay_that_is_gone_releases(sender: Desk, how: str) -> None:
    fetch(sender, 4)
    fetch(sender, 4, key=KvKey("waits/0", 0))
    for index in range(3):
        staged(sender, index)
    if how == "lost":
        sender.lose(FETCHER)
    else:
        sender.join_fetcher("relay-n1", "2")
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "lost")]
    sender.assert_idle()


def test_a_withdrawn_handle_is_quarantined_until_the_fetch_ends(sender: Desk) -> None:
    fetch(sender, 4)
    sender.say(PREFILL, kv.KvWithdraw(HERE.key))
    assert sender.state.ledger.counts() == {"quarantined": 1}
    for index in range(3):
        assert len(staged(sender, index)) == 1
    sender.say(FETCHER, kv.KvFetched(HERE.key))
    assert sender.sent(PREFILL, kv.KvRelease) == [kv.KvRelease(HERE.key, "withdrawn")]


def test_an_unknown_relay_is_asked_for_its_hello_and_one_of_another_version_refused(sender: Desk) -> None:
    stranger = "fetcher:relay-n2"
    sender.say(stranger, kv.KvFetch(HERE.key, 1, SLOT_NBYTES))
    assert sender.sent(stranger, worker.HelloWanted) == [worker.HelloWanted()]
    sender.say(stranger, kv.RelayHello(PROTOCOL + 1, "relay-n2", "1"))
    sender.say(stranger, kv.KvFetch(HERE.key, 1, SLOT_NBYTES))
    assert failure(sender, stranger) == "version_mismatch"


def test_a_lease_is_extended_from_the_other_node(sender: Desk) -> None:
    sender.pass_time(LEASE_S - 1, alive=("prefill-0",))
    sender.say(FETCHER, kv.KvExtend(((HERE.key, "n0"),)))
    sender.pass_time(LEASE_S - 1, alive=("prefill-0",))
    assert sender.state.ledger.counts() == {"ready": 1}
