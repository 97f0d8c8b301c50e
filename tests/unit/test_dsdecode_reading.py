"""A decode machine that reads prompts itself."""

from __future__ import annotations

import pytest

from dsdecode.sequence import Phase
from dskv.handle import KvKey
from dssched.steps import Made, RunStep
from dswire.errors import EngineFailed
from dswire.links import Ready
from dswire.machine import Tick
from dswire.messages import worker
from dswire.messages.client import Sampling
from support.decode_desk import Desk


@pytest.fixture
def desk() -> Desk:
    return Desk().joined()


def test_a_prompt_is_read_in_chunks_beside_what_decodes(desk: Desk) -> None:
    running = desk.running("a")
    key = desk.read("b", 30, first=100)
    desk.now += 1.0
    desk.step(running)
    # a step has room for twelve tokens, one of which is the sequence's that decodes
    assert desk.spans() == [("a", 7, 8), ("b", 0, 11)]
    assert desk.phase(key) is Phase.PREFILLING
    desk.end(Made(running, 7), Made(key, None))
    assert desk.spans() == [("a", 8, 9), ("b", 11, 22)]
    desk.end(Made(running, 7), Made(key, None))
    (step,) = desk.did(RunStep)
    assert [run.draws for run in step.runs] == [True, True]
    desk.now += 0.5
    desk.end(Made(running, 7), Made(key, 40))
    assert desk.told("router", worker.PrefillDone) == [worker.PrefillDone(key, 40, 1.0, 0.5)]
    assert desk.spans() == [("a", 10, 11), ("b", 30, 31)]
    desk.now += 0.25
    desk.step(running, key)
    ((_, made),) = [done.tokens for done in desk.told("router", worker.StepDone)]
    assert (made.key, made.position) == (key, 1)
    assert made.stages == worker.DecodeStages(0.0, 0.0, 0.0, 0.25)


def test_several_prompts_share_the_room_of_a_step_in_order(desk: Desk) -> None:
    desk.read("a", 5)
    desk.read("b", 5, first=50)
    desk.read("c", 5, first=70)
    desk.end(Made(KvKey("a/0", 0), 40))
    assert desk.spans() == [("a", 5, 6), ("b", 0, 5), ("c", 0, 5)]
    desk.step(KvKey("a/0", 0), KvKey("b/0", 0), KvKey("c/0", 0))
    assert desk.spans() == [("a", 6, 7), ("b", 5, 6), ("c", 5, 6)]


def test_prompts_first_where_that_is_wanted() -> None:
    desk = Desk(prefill_priority=True).joined()
    running = desk.running("a")
    desk.read("b", 14, first=100)
    desk.step(running)
    assert desk.spans() == [("b", 0, 12)]
    desk.end(Made(KvKey("b/0", 0), None))
    assert desk.spans() == [("b", 12, 14)]
    desk.end(Made(KvKey("b/0", 0), 40))
    assert desk.spans() == [("a", 7, 8), ("b", 14, 15)]


def test_prompts_get_on_however_many_decode() -> None:
    desk = Desk(max_batch_tokens=2).joined()
    for name in "abc":
        key = desk.running(name)
        if name == "a":
            first = key
    desk.read("d", 9, first=100)
    desk.step(first)
    assert desk.spans()[-1] == ("d", 0, 4)


def test_without_a_relay_prompts_are_read(desk: Desk) -> None:
    desk.say("relay", worker.HelloWanted())
    desk.work("pulled")
    desk.read("read")
    assert desk.spans() == [("read", 0, 6)]
    alone = Desk(relayed=False)
    alone.feed(Tick(alone.now))
    assert alone.say("router", worker.WorkerWelcome("router-0", "1", 5.0)) == [Ready()]


def test_the_first_token_may_be_the_last(desk: Desk) -> None:
    desk.read("a", max_tokens=1)
    desk.step(KvKey("a/0", 0))
    assert [done.finish_reason for done in desk.told("router", worker.PrefillDone)] == ["length"]
    assert desk.state.sequences == {}


def test_a_prompt_that_fails_fails_alone(desk: Desk) -> None:
    key = desk.read("a")
    error = EngineFailed("no such kernel").info()
    desk.end(failed=((key, error),))
    assert desk.failures() == [(key, "engine_failed")]
    assert desk.state.sequences == {}


def test_a_prompt_that_is_read_gives_way_to_older_ones() -> None:
    desk = Desk(blocks=8).joined()
    old = desk.running("old", 6, max_tokens=24)
    young = desk.read("young", 18, max_tokens=4, first=100)
    preempted: list[KvKey] = []
    desk.step(old)
    for _ in range(8):
        (step,) = desk.did(RunStep)
        desk.end(*(Made(run.key, 7 if run.draws else None) for run in step.runs))
        preempted += [one.key for one in desk.told("router", worker.Preempted)]
    assert preempted == [young]
    assert desk.phase(old) is Phase.RUNNING


def test_prompts_that_begin_alike_are_read_once(desk: Desk) -> None:
    first = desk.read("a", 12)
    desk.step(first)
    desk.read("b", 12)
    desk.step(first)
    # two full blocks are known; the third holds the last token, which is always computed
    assert desk.spans() == [("a", 13, 14), ("b", 8, 12)]
    assert (desk.state.pool.found, desk.state.pool.asked) == (8, 24)


def test_the_next_turn_of_a_conversation_finds_the_last_one(desk: Desk) -> None:
    key = desk.read("a", 6, max_tokens=4)
    for token in (7, 8, 9, 10):
        desk.step(key, token=token)
    assert desk.state.pool.held == 0
    again = KvKey("b/0", 0)
    desk.say("router", worker.PrefillWork(again, (1, 2, 3, 4, 5, 6, 7, 8, 60, 61), (), Sampling(max_tokens=4)))
    assert desk.spans() == [("b", 8, 10)]


def test_nobody_gets_what_a_failed_step_wrote(desk: Desk) -> None:
    key = desk.read("a", 12)
    desk.step(key)
    desk.end(failed=((key, EngineFailed("not finite").info()),))
    assert desk.state.pool.kept == 0
    desk.read("b", 12)
    assert desk.spans() == [("b", 0, 12)]
