"""KV that leaves a prefill machine in parts, while the rest of its prompt is still read."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsprefill.events import Seal, Sealed
from dsprefill.state import Phase
from dssched.steps import Made
from dswire.errors import EngineFailed, TransferFailed
from dswire.messages import kv, worker
from support.prefill_desk import Desk

KEY = KvKey("r/0", 0)
FIRST, SECOND = KvKey("r/0", 0, 1), KvKey("r/0", 0, 2)


@pytest.fixture
def desk() -> Desk:
    """A prompt of 22 tokens in chunks of 10, 10 and 2; a block has four."""
    made = Desk(target_tokens=10, part_tokens=4).joined()
    made.work("r", 22)
    return made


def chunk(desk: Desk) -> None:
    """A step that is not the last ends."""
    desk.end(Made(KEY, None))


def handles(desk: Desk) -> list[tuple[KvKey, int, int]]:
    """What was offered and told: key, and the tokens from where to where."""
    offered = [one.handle for one in desk.told("relay", kv.KvOffer)]
    assert offered == [one.handle for one in desk.told("router", worker.KvSealed)]
    return [(one.key, one.start, one.end) for one in offered]


def released(desk: Desk, *keys: KvKey, reason: str = "pulled") -> None:
    for key in keys:
        desk.say("relay", kv.KvRelease(key, reason))


def test_full_blocks_go_ahead_and_the_rest_goes_last(desk: Desk) -> None:
    blocks = desk.state.sequences[KEY].blocks
    chunk(desk)
    assert desk.did(Seal) == [Seal(FIRST, blocks[:2])]
    desk.feed(Sealed(desk.now, FIRST, 11))
    assert handles(desk) == [(FIRST, 0, 8)]
    chunk(desk)
    assert desk.did(Seal) == [Seal(SECOND, blocks[2:5])]
    desk.feed(Sealed(desk.now, SECOND, 12))
    assert handles(desk) == [(SECOND, 8, 20)]
    desk.step(KEY)
    assert desk.did(Seal) == [Seal(KEY, blocks[5:])]
    desk.feed(Sealed(desk.now, KEY, 13))
    assert handles(desk) == [(KEY, 20, 22)]
    # the prompt's first blocks were needed up to its last step, and go with the last part
    released(desk, FIRST, KEY)
    assert desk.state.pool.held == 6
    released(desk, SECOND)
    assert desk.state.pool.held == 0


def test_parts_end_where_blocks_of_both_sides_do() -> None:
    desk = Desk(target_tokens=10, part_tokens=8).joined()
    desk.work("r", 22)
    blocks = desk.state.sequences[KEY].blocks
    chunk(desk)
    assert desk.did(Seal) == [Seal(FIRST, blocks[:2])]


def test_what_is_read_while_a_part_is_summed_goes_with_the_next(desk: Desk) -> None:
    blocks = desk.state.sequences[KEY].blocks
    chunk(desk)
    chunk(desk)
    assert desk.did(Seal) == []
    desk.step(KEY)
    # the order of parts is that of their tokens
    assert desk.did(Seal) == []
    desk.feed(Sealed(desk.now, FIRST, 11))
    assert handles(desk) == [(FIRST, 0, 8)]
    assert desk.did(Seal) == [Seal(KEY, blocks[2:])]
    desk.feed(Sealed(desk.now, KEY, 12))
    assert handles(desk) == [(KEY, 8, 22)]


def test_a_prompt_that_one_step_reads_goes_in_one_piece() -> None:
    desk = Desk(part_tokens=4).joined()
    key = desk.offered("s")
    assert [(one.handle.key, one.handle.start) for one in desk.told("relay", kv.KvOffer)] == [(key, 0)]


def test_an_abort_withdraws_the_parts_and_waits_for_them(desk: Desk) -> None:
    chunk(desk)
    desk.feed(Sealed(desk.now, FIRST, 11))
    desk.say("router", worker.Abort(KEY))
    assert desk.told("relay", kv.KvWithdraw) == [kv.KvWithdraw(FIRST)]
    # a step that uses the blocks is under way
    released(desk, FIRST, reason="withdrawn")
    assert desk.state.pool.held == 6
    chunk(desk)
    assert (desk.state.pool.held, desk.state.sequences) == (0, {})


def test_an_abort_while_a_part_is_summed_waits_for_that(desk: Desk) -> None:
    chunk(desk)
    desk.say("router", worker.Abort(KEY))
    chunk(desk)
    assert desk.state.sequences[KEY].life.phase is Phase.DOOMED
    desk.feed(Sealed(desk.now, FIRST, 11))
    assert desk.told("router", worker.KvSealed) == []
    assert desk.state.pool.held == 0


def test_a_step_that_fails_withdraws_the_parts(desk: Desk) -> None:
    chunk(desk)
    desk.feed(Sealed(desk.now, FIRST, 11))
    desk.end(failed=((KEY, EngineFailed("NaN").info()),))
    assert [one.key for one in desk.told("router", worker.SequenceFailed)] == [KEY]
    assert desk.told("relay", kv.KvWithdraw) == [kv.KvWithdraw(FIRST)]
    released(desk, FIRST, reason="withdrawn")
    assert desk.state.pool.held == 0


def test_an_answer_that_ends_at_once_withdraws_the_parts() -> None:
    desk = Desk(target_tokens=10, part_tokens=4).joined()
    desk.work("r", 12, max_tokens=1)
    chunk(desk)
    desk.feed(Sealed(desk.now, FIRST, 11))
    desk.step(KEY)
    assert desk.told("router", worker.PrefillDone)[0].finish_reason == "length"
    assert desk.told("relay", kv.KvWithdraw) == [kv.KvWithdraw(FIRST)]
    released(desk, FIRST, reason="withdrawn")
    assert desk.state.pool.held == 0


def test_a_part_that_cannot_be_sealed_ends_the_attempt(desk: Desk) -> None:
    chunk(desk)
    desk.feed(Sealed(desk.now, FIRST, 0, TransferFailed("no room").info()))
    assert [one.key for one in desk.told("router", worker.SequenceFailed)] == [KEY]
    chunk(desk)
    assert desk.state.pool.held == 0


def test_another_relay_is_offered_every_part(desk: Desk) -> None:
    chunk(desk)
    desk.feed(Sealed(desk.now, FIRST, 11))
    chunk(desk)
    desk.feed(Sealed(desk.now, SECOND, 12))
    desk.say("relay", kv.KvWelcome("relay-n0", "2", 30.0))
    assert [one.handle.key for one in desk.told("relay", kv.KvOffer)] == [FIRST, SECOND]
