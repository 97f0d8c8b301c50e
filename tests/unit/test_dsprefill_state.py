"""The prefill machine, message by message."""

from __future__ import annotations

import pytest

from dsprefill.events import BeMet, Meeting, Seal, Sealed
from dsprefill.state import Phase
from dssched.steps import Made, RunStep
from dswire.errors import EngineFailed, ErrorInfo, TransferFailed
from dswire.links import RELAY_SILENCE_S, End, Ready
from dswire.machine import PeerLost, Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from support.handles import LAYOUT
from support.instance_desk import LEASE_S, MODEL
from support.prefill_desk import POOL, Desk

HELLO = kv.KvHello(PROTOCOL, "prefill-0", "1", kv.PoolInfo(LAYOUT, POOL, 16))


@pytest.fixture
def desk() -> Desk:
    return Desk().joined()


# greetings


def test_it_says_who_it_is() -> None:
    desk = Desk()
    desk.feed(Tick(100.0))
    hello = worker.WorkerHello(PROTOCOL, "prefill-0", "prefill", "n0", "1", MODEL, worker.Capacity(16, LAYOUT))
    assert desk.actions == [Send("router", hello)]
    desk.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
    assert desk.actions == [Send("relay", HELLO), Ready()]


def test_a_refusal_ends_it() -> None:
    desk = Desk()
    desk.feed(Tick(100.0))
    error = ErrorInfo("duplicate_name", "there is one")
    assert desk.say("router", worker.WorkerRefused(error)) == [End(error)]


# steps


def test_work_runs_at_once_and_its_token_is_told(desk: Desk) -> None:
    key = desk.work("r", 6)
    (run,) = desk.did(RunStep)
    assert [(one.key, one.tokens, len(one.blocks)) for one in run.runs] == [(key, (1, 2, 3, 4, 5, 6), 2)]
    desk.now += 0.5
    desk.step(key)
    assert desk.told("router", worker.PrefillDone) == [worker.PrefillDone(key, 7, 0.0, 0.5)]
    assert desk.did(Seal) == [Seal(key, run.runs[0].blocks)]
    desk.feed(Sealed(desk.now, key, 99))
    (offer,), (sealed,) = desk.told("relay", kv.KvOffer), desk.told("router", worker.KvSealed)
    assert offer.handle == sealed.handle
    assert (offer.handle.tokens, offer.handle.checksum, offer.handle.shards) == (6, 99, POOL)
    desk.say("relay", kv.KvRelease(key, "pulled"))
    assert desk.state.pool.held == 0


def test_what_nobody_can_be_shown_is_not_offered(desk: Desk) -> None:
    key = desk.work("r")
    desk.step(key)
    error = TransferFailed("no room").info()
    desk.feed(Sealed(desk.now, key, 0, error))
    assert desk.told("router", worker.SequenceFailed) == [worker.SequenceFailed(key, error)]
    assert not desk.told("relay", kv.KvOffer)
    assert not desk.state.sequences
    assert desk.state.pool.free == 16


def test_output_of_an_earlier_attempt_is_read_too(desk: Desk) -> None:
    key = desk.work("r", 6, output=(21, 22, 23))
    (run,) = desk.did(RunStep)
    assert (run.runs[0].tokens[6:], len(run.runs[0].blocks)) == ((21, 22, 23), 3)
    desk.step(key)
    desk.feed(Sealed(desk.now, key, 1))
    assert desk.told("relay", kv.KvOffer)[0].handle.tokens == 9


def test_one_step_at_a_time_first_come_first_served(desk: Desk) -> None:
    first = desk.work("a", 6)
    rest = [desk.work(name, 10) for name in "bcd"]
    assert desk.did(RunStep) == []
    desk.now += 2.0
    desk.step(first)
    (run,) = desk.did(RunStep)
    # two of ten tokens are 20, a third would be above the target of 24
    assert [one.key for one in run.runs] == rest[:2]
    desk.step(*rest[:2])
    assert [done.queue_s for done in desk.told("router", worker.PrefillDone)] == [2.0, 2.0]


def test_a_long_prompt_is_read_in_chunks(desk: Desk) -> None:
    long, short = desk.work("a", 50), desk.work("b", 10)
    desk.end(Made(long, None))
    (run,) = desk.did(RunStep)
    assert [(one.key, one.start, one.end, one.draws) for one in run.runs] == [(long, 24, 48, False)]
    desk.now += 1.0
    desk.end(Made(long, None))
    (run,) = desk.did(RunStep)
    # the rest of the long one leaves room for the other
    assert [(one.key, one.start, one.end, one.draws) for one in run.runs] == [
        (long, 48, 50, True),
        (short, 0, 10, True),
    ]
    desk.now += 0.5
    desk.step(long, short)
    done = desk.told("router", worker.PrefillDone)
    assert [(one.queue_s, one.prefill_s) for one in done] == [(0.0, 1.5), (1.0, 0.5)]


def test_a_prompt_is_aborted_between_its_chunks() -> None:
    desk = Desk(stages=2).joined()
    long, other = desk.work("a", 50), desk.work("b", 50)
    desk.say("router", worker.Abort(long))
    desk.end(Made(long, None))
    assert list(desk.state.sequences) == [other]
    desk.say("router", worker.Abort(other))
    desk.end(Made(other, None))
    assert desk.state.pool.held == 0


def test_blocks_of_prompts_that_begin_alike_are_shared() -> None:
    desk = Desk(prefix_cache=True).joined()
    first = desk.offered("a")
    second = desk.work("b", 13)
    (run,) = desk.did(RunStep)
    assert [(one.start, one.end) for one in run.runs] == [(4, 13)]
    assert run.runs[0].blocks[0] == desk.state.sequences[first].blocks[0]
    desk.step(second)
    desk.feed(Sealed(desk.now, second, 1))
    desk.say("relay", kv.KvRelease(first, "pulled"))
    assert desk.state.pool.held == 4
    desk.say("relay", kv.KvRelease(second, "pulled"))
    assert (desk.state.pool.held, desk.state.pool.free, desk.state.pool.kept) == (0, 16, 3)


def test_steps_of_several_stages_are_of_different_sequences() -> None:
    desk = Desk(stages=2).joined()
    first, second = desk.work("a", 20), desk.work("b", 20)
    assert list(desk.state.steps.values()) == [(first,), (second,)]
    desk.work("c", 20)
    assert desk.did(RunStep) == []


@pytest.mark.parametrize(("token", "reason", "max_tokens"), [(0, "stop", 8), (7, "length", 1)])
def test_a_sequence_that_is_over_is_not_offered(desk: Desk, token: int, reason: str, max_tokens: int) -> None:
    key = desk.work("r", max_tokens=max_tokens)
    desk.step(key, token=token)
    assert [done.finish_reason for done in desk.told("router", worker.PrefillDone)] == [reason]
    assert desk.did(Seal) == []
    assert desk.state.pool.held == 0


def test_a_sequence_that_fails_fails_alone(desk: Desk) -> None:
    first = desk.work("a")
    second, third = desk.work("b"), desk.work("c")
    desk.step(first)
    error = EngineFailed("no such kernel").info()
    desk.end(Made(third, 7), failed=((second, error),))
    assert desk.told("router", worker.SequenceFailed) == [worker.SequenceFailed(second, error)]
    assert [done.key for done in desk.told("router", worker.PrefillDone)] == [third]
    assert second not in desk.state.sequences


def test_the_head_waits_for_blocks() -> None:
    desk = Desk(blocks=5).joined()
    held = desk.offered("a")
    waiting = desk.work("b", 16)
    assert desk.did(RunStep) == []
    desk.say("relay", kv.KvRelease(held, "pulled"))
    assert [one.key for run in desk.did(RunStep) for one in run.runs] == [waiting]


# refusals


def test_a_full_queue_refuses(desk: Desk) -> None:
    for name in "abcde":
        desk.work(name)
    key = desk.work("f")
    assert [(one.key, one.error.code) for one in desk.told("router", worker.SequenceFailed)] == [
        (key, "overloaded")
    ]


def test_what_can_never_fit_is_refused(desk: Desk) -> None:
    key = desk.work("r", 65)
    (failed,) = desk.told("router", worker.SequenceFailed)
    assert (failed.key, failed.error.code) == (key, "invalid_request")
    assert "65 tokens do not fit prefill-0, whose KV pool has room for 64" in failed.error.message


def test_work_that_comes_twice_is_ignored_while_the_first_lives(desk: Desk) -> None:
    desk.work("r")
    desk.work("r")
    assert desk.actions == []


def test_the_key_of_a_doomed_sequence_is_refused_for_another_attempt(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("router", worker.Abort(key))
    desk.work("r")
    assert [(one.key, one.error.code) for one in desk.told("router", worker.SequenceFailed)] == [
        (key, "overloaded")
    ]
    desk.step(key)
    assert desk.state.sequences == {}


# aborts


def test_abort_in_every_phase(desk: Desk) -> None:
    running, queued = desk.work("a"), desk.work("b")
    desk.say("router", worker.Abort(queued))
    assert queued not in desk.state.sequences
    desk.say("router", worker.Abort(running))
    assert desk.state.sequences[running].life.phase is Phase.DOOMED
    desk.step(running)
    assert desk.told("router", worker.PrefillDone) == []
    sealing = desk.work("c")
    desk.step(sealing)
    desk.say("router", worker.Abort(sealing))
    desk.feed(Sealed(desk.now, sealing, 1))
    assert desk.told("relay", kv.KvOffer) == []
    offered = desk.offered("d")
    desk.say("router", worker.Abort(offered))
    assert desk.actions == [Send("relay", kv.KvWithdraw(offered))]
    assert desk.state.pool.held == 2
    desk.say("relay", kv.KvRelease(offered, "withdrawn"))
    assert desk.state.pool.held == 0


def test_a_lost_router_takes_everything_with_it(desk: Desk) -> None:
    offered, running = desk.offered("a"), desk.work("b")
    desk.say("router", worker.HelloWanted())
    assert desk.told("relay", kv.KvWithdraw) == [kv.KvWithdraw(offered)]
    assert desk.state.sequences[running].life.phase is Phase.DOOMED


# the relay


def test_a_relay_that_is_back_gets_its_offers_again(desk: Desk) -> None:
    kept, withdrawn = desk.offered("a"), desk.offered("b")
    desk.say("router", worker.Abort(withdrawn))
    desk.say("relay", worker.HelloWanted())
    assert desk.actions == [Send("relay", HELLO)]
    desk.say("relay", kv.KvWelcome("relay-n0", "2", LEASE_S))
    told = [send.message for send in desk.did(Send)]
    assert [(type(one).__name__, getattr(one, "key", None) or one.handle.key) for one in told] == [  # type: ignore[attr-defined]
        ("KvOffer", kept),
        ("KvOffer", withdrawn),
        ("KvWithdraw", withdrawn),
    ]


def test_what_is_sealed_while_the_relay_is_away_is_offered_later(desk: Desk) -> None:
    desk.say("relay", worker.HelloWanted())
    key = desk.offered()
    assert desk.told("relay", kv.KvOffer) == []
    assert len(desk.told("router", worker.KvSealed)) == 1
    desk.say("relay", kv.KvWelcome("relay-n0", "2", LEASE_S))
    assert [one.handle.key for one in desk.told("relay", kv.KvOffer)] == [key]


def test_a_relay_that_says_nothing_for_a_lease_loses_its_handles(desk: Desk) -> None:
    key = desk.offered()
    desk.feed(PeerLost(desk.now, "relay"))
    desk.now += LEASE_S - RELAY_SILENCE_S - 0.1
    desk.feed(Tick(desk.now))
    assert key in desk.state.sequences
    desk.now += 0.1
    desk.feed(Tick(desk.now))
    assert [(one.key, one.error.code) for one in desk.told("router", worker.SequenceFailed)] == [
        (key, "transfer_failed")
    ]
    assert desk.state.pool.held == 0


def test_a_release_that_was_lost_is_asked_for_after_a_lease(desk: Desk) -> None:
    kept, withdrawn = desk.offered("a"), desk.offered("b")
    desk.say("router", worker.Abort(withdrawn))
    for _ in range(int(LEASE_S)):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
        assert desk.told("relay", kv.KvHeld) == []
    desk.feed(Tick(desk.now))
    assert [send.message for send in desk.did(Send)] == [kv.KvHeld(kept), kv.KvWithdraw(withdrawn)]
    desk.say("relay", kv.KvRelease(kept, "lost"))
    desk.say("relay", kv.KvCancelled(withdrawn, "in_flight_quarantined"))
    assert list(desk.state.sequences) == [withdrawn]
    desk.say("relay", kv.KvCancelled(withdrawn, "unknown"))
    assert desk.state.pool.held == 0


def test_its_load(desk: Desk) -> None:
    desk.offered("a")
    desk.work("b")
    desk.work("c")
    desk.ping()
    (report,) = desk.told("router", worker.WorkerReport)
    load = worker.Load(waiting=1, running=1, blocks_held=4, prompt_tokens=12)
    assert report == worker.WorkerReport(load, sent=2)


# trials


def test_it_is_met_by_a_reader_that_tries_it(desk: Desk) -> None:
    assert desk.say("relay", kv.KvMeet("decode-0", "fetcher:relay-n1")) == [BeMet("decode-0", "fetcher:relay-n1")]
    told = kv.KvMeeting("decode-0", "fetcher:relay-n1", "10.0.0.1:9/x")
    desk.feed(Meeting(desk.now, told.reader, told.by, told.meeting))
    assert desk.actions == [Send("relay", told)]
    error = TransferFailed("no port").info()
    desk.feed(Meeting(desk.now, told.reader, told.by, "", error))
    assert desk.actions == [Send("relay", kv.KvMeeting(told.reader, told.by, error=error))]
