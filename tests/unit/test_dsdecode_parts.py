"""KV that comes to a decode machine in parts, while the rest of its prompt is still read."""

from __future__ import annotations

import msgspec
import pytest

from dsdecode.events import CopyDirect, CopyEnded
from dsdecode.sequence import Phase
from dskv.handle import KvHandle, KvKey
from dskv.shards import shards
from dssched.steps import RunStep, StartSequence
from dswire.errors import KvCorrupt
from dswire.machine import Tick
from dswire.messages import kv, worker
from dswire.messages.client import Sampling
from support.decode_desk import Desk
from support.handles import LAYOUT

ASKED = Sampling(max_tokens=8)
KEY = KvKey("r/0", 0)
PROMPT = tuple(range(1, 15))


def part(number: int, start: int, end: int) -> KvHandle:
    blocks = tuple(range(start // LAYOUT.block_size, LAYOUT.blocks_for(end)))
    key = KvKey(KEY.sequence, KEY.epoch, number)
    pool = shards(LAYOUT, 1, 1, ["/pool"])
    return KvHandle(key, "prefill-0", "n1", LAYOUT, end - start, blocks, pool, 64, 99, start)


FIRST, SECOND, LAST = part(1, 0, 8), part(2, 8, 12), part(0, 12, 14)


@pytest.fixture
def desk() -> Desk:
    return Desk().joined()


def begun(desk: Desk) -> Desk:
    """The first part is here."""
    desk.say("router", worker.DecodeWork(FIRST, PROMPT, (), ASKED))
    desk.land(FIRST.key)
    return desk


def test_parts_are_pulled_one_after_the_other_into_their_own_blocks(desk: Desk) -> None:
    desk.say("router", worker.DecodeWork(FIRST, PROMPT, (), ASKED))
    assert [pull.handle for pull in desk.told("relay", kv.KvPull)] == [FIRST]
    # for the prompt and one more token, as if all of it had come
    assert desk.state.pool.held == 4
    own = desk.state.sequences[KEY].blocks
    desk.say("router", worker.DecodeMore(SECOND))
    assert desk.told("relay", kv.KvPull) == []
    desk.say("relay", kv.KvGrant(FIRST.key))
    assert desk.did(CopyDirect) == [CopyDirect(FIRST, own[:2])]
    desk.feed(CopyEnded(desk.now, FIRST.key))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(FIRST.key)]
    assert [pull.handle for pull in desk.told("relay", kv.KvPull)] == [SECOND]
    desk.say("relay", kv.KvGrant(SECOND.key))
    assert desk.did(CopyDirect) == [CopyDirect(SECOND, own[2:3])]
    desk.feed(CopyEnded(desk.now, SECOND.key))
    assert (desk.phase(KEY), desk.did(RunStep)) == (Phase.PULLING, [])
    desk.say("router", worker.DecodeMore(LAST, (50,)))
    desk.say("relay", kv.KvGrant(LAST.key))
    assert desk.did(CopyDirect) == [CopyDirect(LAST, own[3:4])]
    desk.feed(CopyEnded(desk.now, LAST.key))
    assert desk.did(StartSequence) == [StartSequence(KEY, PROMPT, (50,), ASKED)]
    (run,) = desk.did(RunStep)
    assert [(one.key, one.tokens, one.start, one.blocks) for one in run.runs] == [(KEY, (50,), 14, own)]


def test_only_what_came_after_the_first_token_counts_as_transfer(desk: Desk) -> None:
    desk.say("router", worker.DecodeWork(FIRST, PROMPT, (), ASKED))
    desk.now += 0.5
    desk.land(FIRST.key)
    desk.now += 2
    desk.say("router", worker.DecodeMore(part(0, 8, 14), (50,)))
    desk.now += 0.25
    desk.land(KEY)
    desk.step(KEY)
    (made,) = desk.told("router", worker.StepDone)[0].tokens
    assert made.stages is not None
    assert (made.stages.transfer_wait_s, made.stages.transfer_s, made.stages.transfer_hidden_s) == (0, 0.25, 0.5)


def test_one_that_waits_for_parts_is_in_nobodys_way(desk: Desk) -> None:
    begun(desk)
    other = desk.running("other")
    assert desk.phase(other) is Phase.RUNNING
    assert desk.state.next_deadline() is not None


def test_the_leases_of_all_parts_are_kept_until_they_are_pulled(desk: Desk) -> None:
    desk.say("router", worker.DecodeWork(FIRST, PROMPT, (), ASKED))
    desk.say("router", worker.DecodeMore(SECOND))
    for _ in range(10):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
    desk.feed(Tick(desk.now))
    assert desk.told("relay", kv.KvExtend) == [kv.KvExtend(((FIRST.key, "n1"), (SECOND.key, "n1")))]


def test_a_part_that_is_wrong_twice_ends_the_attempt(desk: Desk) -> None:
    desk.say("router", worker.DecodeWork(FIRST, PROMPT, (), ASKED))
    wrong = KvCorrupt("bits").info()
    desk.say("relay", kv.KvGrant(FIRST.key))
    desk.feed(CopyEnded(desk.now, FIRST.key, wrong))
    assert desk.told("relay", kv.KvAgain) == [kv.KvAgain(FIRST.key)]
    desk.say("relay", kv.KvGrant(FIRST.key))
    desk.feed(CopyEnded(desk.now, FIRST.key, wrong))
    assert desk.failures() == [(KEY, "kv_corrupt")]
    assert desk.state.pool.held == 0


@pytest.mark.parametrize("wrong", [part(2, 12, 14), part(2, 4, 8), msgspec.structs.replace(SECOND, start=9)])
def test_parts_that_leave_a_gap_or_overlap_end_the_attempt(desk: Desk, wrong: KvHandle) -> None:
    begun(desk).say("router", worker.DecodeMore(wrong))
    assert desk.failures() == [(KEY, "transfer_failed")]
    assert desk.state.pool.held == 0


def test_an_abort_between_two_parts_gives_the_blocks_back(desk: Desk) -> None:
    begun(desk).say("router", worker.Abort(KEY))
    assert desk.told("relay", kv.KvAbort) == []
    assert (desk.phase(KEY), desk.state.pool.held) == (None, 0)
    # what is late concerns nobody
    desk.say("router", worker.DecodeMore(SECOND))
    assert desk.state.sequences == {}


def test_an_abort_in_a_part_tells_the_relay(desk: Desk) -> None:
    begun(desk).say("router", worker.DecodeMore(SECOND))
    desk.say("router", worker.Abort(KEY))
    assert desk.told("relay", kv.KvAbort) == [kv.KvAbort(SECOND.key)]


def test_a_part_that_is_told_twice_is_pulled_once(desk: Desk) -> None:
    begun(desk).say("router", worker.DecodeMore(SECOND))
    desk.say("router", worker.DecodeMore(SECOND))
    assert desk.state.sequences[KEY].handles == [FIRST, SECOND]
