"""The decode machine, message by message."""

from __future__ import annotations

import pytest

from dsdecode.events import CopyEnded
from dsdecode.sequence import Phase
from dskv.handle import KvKey
from dskv.layout import KvLayout
from dssched.steps import ForgetSequence, Made, RunStep
from dswire.errors import EngineFailed, ErrorInfo
from dswire.links import End, Ready
from dswire.machine import Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from dswire.messages.client import Sampling
from support.decode_desk import Desk
from support.handles import LAYOUT
from support.instance_desk import LEASE_S, MODEL


@pytest.fixture
def desk() -> Desk:
    return Desk().joined()


def test_it_says_who_it_is_and_ends_when_refused() -> None:
    desk = Desk()
    desk.feed(Tick(100.0))
    hello = worker.WorkerHello(
        PROTOCOL, "decode-0", "decode", "n0", "1", MODEL, worker.Capacity(16, LAYOUT, keeps=True)
    )
    assert desk.actions == [Send("router", hello)]
    desk.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
    assert desk.actions == [Send("relay", kv.KvHello(PROTOCOL, "decode-0", "1")), Ready()]
    error = ErrorInfo("refused", "no")
    assert desk.say("relay", kv.KvRefused(error)) == [End(error)]


# refusals


def test_work_that_cannot_be_taken_is_refused() -> None:
    desk = Desk(max_queue=1, max_batch=1).joined()
    desk.running("a")
    too_long = desk.work("b", 60, max_tokens=5)
    assert desk.failures() == [(too_long, "invalid_request")]
    other = desk.work("c", layout=KvLayout(1, 1, 4, 4, "float32"))
    assert desk.failures() == [(other, "invalid_request")]
    desk.work("d")
    full = desk.work("e")
    assert desk.failures() == [(full, "overloaded")]


def test_work_that_comes_twice_is_ignored_unless_the_first_is_doomed(desk: Desk) -> None:
    key = desk.running("r")
    desk.work("r")
    assert desk.actions == []
    desk.say("router", worker.Abort(key))
    desk.work("r")
    assert desk.failures() == [(key, "overloaded")]


# steps


def test_all_that_run_step_together(desk: Desk) -> None:
    first = desk.running("a")
    second = desk.running("b")
    desk.step(first)
    (run,) = desk.did(RunStep)
    assert [(one.key, one.tokens, one.start) for one in run.runs] == [(first, (7,), 7), (second, (50,), 6)]
    desk.step(first, second)
    (done,) = desk.told("router", worker.StepDone)
    assert [(made.key, made.position) for made in done.tokens] == [(first, 2), (second, 1)]


def test_the_first_token_tells_where_the_time_went(desk: Desk) -> None:
    desk.state.links.relay.forget(desk.now)
    key = desk.work("r")
    desk.now += 1.0
    desk.say("relay", kv.KvWelcome("relay-n0", "1", LEASE_S))
    desk.now += 2.0
    desk.land(key)
    desk.step(key)
    desk.step(key)
    first = worker.DecodeStages(transfer_wait_s=1.0, transfer_s=2.0, decode_queue_s=0.0, first_step_s=0.25)
    assert [made.stages for done in desk.told("router", worker.StepDone) for made in done.tokens] == [None]
    assert desk.state.sequences[key].stages(0.25) == first


@pytest.mark.parametrize(("token", "reason", "max_tokens"), [(0, "stop", 8), (7, "length", 2)])
def test_a_sequence_that_is_over_is_dropped(desk: Desk, token: int, reason: str, max_tokens: int) -> None:
    key = desk.running("r", max_tokens=max_tokens)
    desk.step(key, token=token)
    (done,) = desk.told("router", worker.StepDone)
    assert [made.finish_reason for made in done.tokens] == [reason]
    assert desk.did(ForgetSequence) == [ForgetSequence(key)]
    assert desk.state.pool.held == 0


def test_a_sequence_that_fails_fails_alone(desk: Desk) -> None:
    first = desk.running("a")
    second = desk.running("b")
    desk.step(first)
    error = EngineFailed("no such kernel").info()
    desk.end(Made(second, 7), failed=((first, error),))
    assert desk.failures() == [(first, "engine_failed")]
    assert desk.phase(second) is Phase.RUNNING


def test_the_youngest_is_preempted_when_blocks_run_out() -> None:
    desk = Desk(blocks=5).joined()
    old = desk.running("old", 4, max_tokens=16)
    young = desk.running("young", 4, max_tokens=16)
    preempted: list[KvKey] = []
    desk.step(old)
    for _ in range(12):
        running = [key for key in (old, young) if desk.phase(key) is Phase.RUNNING]
        desk.step(*running)
        preempted += [one.key for one in desk.told("router", worker.Preempted)]
    assert preempted == [young]
    assert desk.phase(old) is Phase.RUNNING


def test_what_was_freed_for_the_old_goes_to_nobody_new_before_a_step_has_ended() -> None:
    desk = Desk(blocks=6).joined()
    old = desk.running("old", 4, max_tokens=16)
    young = desk.running("young", 10, max_tokens=10)
    new = desk.work("new", 4)
    desk.step(old)
    for _ in range(8):
        desk.step(*[key for key in (old, young) if desk.phase(key) is Phase.RUNNING])
        if desk.told("router", worker.Preempted):
            break
    assert desk.phase(young) is None
    assert desk.state.pool.free == 3
    # whatever comes meanwhile
    desk.feed(Tick(desk.now))
    assert desk.phase(new) is Phase.WAITING
    desk.step(old)
    assert desk.phase(new) is Phase.PULLING


# several steps under way


def test_as_many_steps_as_stages_of_different_sequences() -> None:
    desk = Desk(stages=2).joined()
    keys = [desk.running(name) for name in "abcd"]
    assert len(desk.state.steps) == 2
    for _ in range(6):
        number = min(desk.state.steps)
        desk.step(*desk.state.steps[number])
    # in the end each half of the four has its own turn
    assert sorted(len(step) for step in desk.state.steps.values()) == [2, 2]
    assert {key for step in desk.state.steps.values() for key in step} == set(keys)


def test_nobody_gives_way_while_a_step_may_free_blocks() -> None:
    desk = Desk(blocks=5, stages=2).joined()
    old = desk.running("old", 6, max_tokens=14)
    young = desk.running("young", 6, max_tokens=3)
    preempted: list[KvKey] = []
    for _ in range(12):
        if not desk.state.steps:
            break
        desk.step(*desk.state.steps[min(desk.state.steps)])
        preempted += [one.key for one in desk.told("router", worker.Preempted)]
    assert preempted == []
    assert desk.phase(young) is None
    assert desk.phase(old) is Phase.RUNNING


# ends


def test_a_prompt_that_is_read_is_aborted() -> None:
    desk = Desk().joined()
    key, waiting = desk.read("a", 40), desk.read("b", 40, first=100)
    desk.say("router", worker.Abort(waiting))
    assert desk.phase(waiting) is None
    desk.say("router", worker.Abort(key))
    assert desk.phase(key) is Phase.DOOMED
    desk.end(Made(key, None))
    assert desk.state.sequences == {}
    assert desk.state.pool.held == 0


def test_abort_in_every_phase() -> None:
    desk = Desk(max_batch=3).joined()
    running, pulling, copying, waiting = desk.running("a"), desk.work("b"), desk.work("c"), desk.work("d")
    desk.say("relay", kv.KvGrant(copying))
    for key in (waiting, pulling, copying, running):
        desk.say("router", worker.Abort(key))
    assert [desk.phase(key) for key in (waiting, pulling, copying, running)] == [
        None,
        None,
        Phase.DOOMED,
        Phase.DOOMED,
    ]
    desk.feed(CopyEnded(desk.now, copying))
    assert desk.told("relay", kv.KvAbort) == [kv.KvAbort(copying)]
    assert desk.told("relay", kv.KvPulled) == []
    desk.step(running)
    assert desk.told("router", worker.StepDone) == []
    assert desk.state.sequences == {}
    assert desk.state.pool.held == 0


def test_a_lost_router_takes_everything_with_it(desk: Desk) -> None:
    running, pulling = desk.running("a"), desk.work("b")
    desk.say("router", worker.HelloWanted())
    assert desk.told("relay", kv.KvAbort) == [kv.KvAbort(pulling)]
    assert [desk.phase(key) for key in (running, pulling)] == [Phase.DOOMED, None]


def test_late_words_of_the_relay_change_nothing(desk: Desk) -> None:
    key = desk.running("r")
    late = [
        kv.KvGrant(key),
        kv.KvFailed(key, ErrorInfo("transfer_failed", "late")),
        kv.KvGrant(KvKey("nobody/0", 0)),
    ]
    for message in late:
        assert desk.say("relay", message) == []


def test_its_load(desk: Desk) -> None:
    desk.running("a")
    desk.work("b")
    desk.ping()
    (report,) = desk.told("router", worker.WorkerReport)
    assert report == worker.WorkerReport(worker.Load(waiting=1, running=1, blocks_held=4), sent=0)


# several steps as one


def steady(desk: Desk, name: str, tokens: int, max_tokens: int) -> KvKey:
    """A sequence that runs until it is out of tokens, whatever they are, and has made its first one here."""
    key = KvKey(f"{name}/0", 0)
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    desk.say("router", worker.PrefillWork(key, tuple(range(1, tokens + 1)), (), sampling))
    desk.step(key)
    return key


def repeats(desk: Desk) -> int:
    (step,) = desk.did(RunStep)
    return step.repeat


def test_steps_are_run_as_one_until_somebody_ends() -> None:
    desk = Desk(repeats=True).joined()
    key = steady(desk, "r", 6, 9)
    assert repeats(desk) == 1, "when the first step ends is told"
    desk.step(key)
    assert repeats(desk) == 6, "two of nine are made, and the last is its end"
    desk.end(Made(key, 7, None, (8, 9)))
    (done,) = desk.told("router", worker.StepDone)
    assert [(made.position, made.token, made.more) for made in done.tokens] == [(2, 7, (8, 9))]
    assert desk.state.sequences[key].output_ids == [7, 7, 7, 8, 9]
    # eleven tokens, and the block of the one that comes
    assert (desk.state.pool.held, repeats(desk)) == (3, 3)


@pytest.mark.parametrize(
    ("max_tokens", "other", "expected"),
    [(30, "reads", 1), (30, "may end", 1), (30, "waits", 27), (30, "is pulled", 27), (58, "is pulled", 27)],
)
def test_steps_are_run_one_by_one_while_anything_may_happen(max_tokens: int, other: str, expected: int) -> None:
    desk = Desk(repeats=True, blocks=16).joined()
    key = steady(desk, "r", 6, max_tokens)
    desk.step(key)
    # sixteen blocks are enough for all tokens of one that may have 58, fourteen are not
    assert repeats(desk) == desk.state.repeat() == max_tokens - 3
    match other:
        case "reads":
            desk.read("a")
        case "may end":
            desk.running("a")
        case "waits":
            desk.work("a", 60, 2)
        case "is pulled":
            desk.work("a")
    assert desk.state.repeat() == expected


def test_an_engine_that_runs_one_step_at_a_time_is_asked_for_one(desk: Desk) -> None:
    key = steady(desk, "r", 6, 30)
    desk.step(key)
    assert repeats(desk) == 1
