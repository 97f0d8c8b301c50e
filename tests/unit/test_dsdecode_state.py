"""The decode machine, message by message."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import pytest

from dsdecode.config import MAX_PULLS, DecodeConfig
from dsdecode.events import CopyChunk, CopyDirect, CopyEnded
from dsdecode.sequence import Phase
from dsdecode.state import DecodeState
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import shards
from dssched.steps import ForgetSequence, Made, RunStep, StartSequence, Stepped
from dswire.errors import EngineFailed, ErrorInfo, KvCorrupt, TransferFailed
from dswire.links import End, Ready
from dswire.machine import Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from dswire.messages.client import Sampling
from support.handles import LAYOUT

ActionT = TypeVar("ActionT")
MessageT = TypeVar("MessageT", bound=msgspec.Struct)

MODEL = worker.ModelIdentity("tiny", "f", "float16")
LEASE_S = 30.0


class Desk:
    """One machine under a clock of its own, validated after every event."""

    def __init__(
        self,
        *,
        blocks: int = 16,
        max_queue: int = 12,
        max_batch: int = 4,
        max_batch_tokens: int = 12,
        node: str = "n0",
        **settings: Any,
    ) -> None:
        capacity = worker.Capacity(blocks, LAYOUT)
        config = DecodeConfig(
            name="decode-0",
            node=node,
            incarnation="1",
            model=MODEL,
            capacity=capacity,
            eos_ids=frozenset({0}),
            max_queue=max_queue,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            **settings,
        )
        self.state = DecodeState(config)
        self.now = 100.0
        self.actions: list[Any] = []
        #: work and aborts that the router sent
        self.router_sent = 0

    def feed(self, event: Any) -> list[Any]:
        self.actions = self.state.handle(event)
        self.state.validate()
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Any]:
        self.router_sent += isinstance(message, worker.PrefillWork | worker.DecodeWork | worker.Abort)
        return self.feed(Received(self.now, peer, message))

    def ping(self) -> list[Any]:
        """The router's ping."""
        return self.say("router", worker.RouterPing(self.router_sent))

    def joined(self) -> Desk:
        self.feed(Tick(self.now))
        self.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
        self.say("relay", kv.KvWelcome("relay-n0", "1", LEASE_S, "/staging", 4, 64))
        return self

    def work(self, name: str, tokens: int = 6, max_tokens: int = 8, *, layout: KvLayout = LAYOUT) -> KvKey:
        """Work on a prompt of ``tokens`` tokens, to which prefill made one."""
        key = KvKey(f"{name}/0", 0)
        blocks = tuple(range(layout.blocks_for(tokens)))
        handle = KvHandle(key, "prefill-0", "n1", layout, tokens, blocks, shards(layout, 1, 1, ["/pool"]), 64, 99)
        prompt = tuple(range(1, tokens + 1))
        self.say("router", worker.DecodeWork(handle, prompt, (50,), Sampling(max_tokens=max_tokens)))
        return key

    def did(self, kind: type[ActionT]) -> list[ActionT]:
        return [action for action in self.actions if isinstance(action, kind)]

    def told(self, peer: str, kind: type[MessageT]) -> list[MessageT]:
        sends = [action for action in self.did(Send) if action.peer == peer]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def land(self, key: KvKey) -> list[Any]:
        """The whole KV comes directly."""
        self.say("relay", kv.KvGrant(key))
        return self.feed(CopyEnded(self.now, key, None, True))

    def running(self, name: str, tokens: int = 6, max_tokens: int = 8) -> KvKey:
        key = self.work(name, tokens, max_tokens)
        self.land(key)
        return key

    def step(self, *keys: KvKey, token: int = 7) -> list[Any]:
        return self.end(*(Made(key, token) for key in keys))

    def end(self, *made: Made, failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()) -> list[Any]:
        """The oldest step ends."""
        return self.feed(Stepped(self.now, min(self.state.steps), made, 0.25, failed))

    def read(self, name: str, tokens: int = 6, max_tokens: int = 8, *, first: int = 1) -> KvKey:
        """Work on a prompt that is to be read here."""
        key = KvKey(f"{name}/0", 0)
        prompt = tuple(range(first, first + tokens))
        self.say("router", worker.PrefillWork(key, prompt, (), Sampling(max_tokens=max_tokens)))
        return key

    def spans(self) -> list[tuple[str, int, int]]:
        """The step that was asked for: name of each sequence, first and last position."""
        (step,) = self.did(RunStep)
        return [(run.key.sequence[:-2], run.start, run.end) for run in step.runs]

    def phase(self, key: KvKey) -> Phase | None:
        one = self.state.sequences.get(key)
        return one.life.phase if one is not None else None

    def failures(self) -> list[tuple[KvKey, str]]:
        return [(one.key, one.error.code) for one in self.told("router", worker.SequenceFailed)]


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


# pulls


def test_blocks_are_taken_then_the_kv_is_pulled(desk: Desk) -> None:
    key = desk.work("r", 8)
    (pull,) = desk.told("relay", kv.KvPull)
    assert pull.handle.key == key
    # eight tokens fill two blocks; the first step needs a third
    assert desk.state.pool.held == 3
    desk.say("relay", kv.KvGrant(key))
    assert desk.did(CopyDirect) == [CopyDirect(pull.handle, tuple(desk.state.sequences[key].blocks))]
    desk.feed(CopyEnded(desk.now, key, None, True))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key)]
    assert desk.did(StartSequence) == [StartSequence(key, tuple(range(1, 9)), (50,), Sampling(max_tokens=8))]
    (run,) = desk.did(RunStep)
    assert [(one.key, one.tokens, one.start, len(one.blocks)) for one in run.runs] == [(key, (50,), 8, 3)]


def test_chunks_are_copied_and_their_slots_given_back(desk: Desk) -> None:
    key = desk.work("r", 12)
    chunks = (kv.Chunk(0, 0, 2), kv.Chunk(1, 2, 1))
    for slot, chunk in enumerate(chunks):
        desk.say("relay", kv.KvChunkReady(key, chunk, slot))
        (copy,) = desk.did(CopyChunk)
        assert (copy.chunk, copy.slot, copy.last) == (chunk, slot, chunk is chunks[1])
    desk.feed(CopyEnded(desk.now, key, chunks[0], False))
    assert desk.actions == [Send("relay", kv.KvTaken(key, chunks[0]))]
    desk.feed(CopyEnded(desk.now, key, chunks[1], True))
    assert desk.told("relay", kv.KvTaken) == [kv.KvTaken(key, chunks[1])]
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key)]


def test_wrong_kv_is_told_to_both_sides(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvGrant(key))
    error = KvCorrupt("it is not what was sealed").info()
    desk.feed(CopyEnded(desk.now, key, None, True, error))
    assert desk.actions == [Send("relay", kv.KvAgain(key))], "once more, from the source"
    desk.say("relay", kv.KvGrant(key))
    desk.feed(CopyEnded(desk.now, key, None, True, error))
    assert desk.told("relay", kv.KvPulled) == [kv.KvPulled(key, error)]
    assert desk.told("relay", kv.KvAbort) == []
    assert desk.failures() == [(key, "kv_corrupt")]
    assert desk.state.pool.held == 0


def test_a_pull_that_the_relay_gives_up_fails(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvFailed(key, ErrorInfo("transfer_failed", "no")))
    assert desk.failures() == [(key, "transfer_failed")]
    assert desk.told("relay", kv.KvAbort) == []
    assert desk.state.pool.held == 0


def test_wrong_kv_that_is_right_the_second_time_runs(desk: Desk) -> None:
    key = desk.work("r")
    desk.say("relay", kv.KvGrant(key))
    desk.feed(CopyEnded(desk.now, key, None, True, KvCorrupt("it is not what was sealed").info()))
    desk.land(key)
    assert desk.phase(key) is Phase.RUNNING


def test_a_pull_of_which_nothing_is_heard_for_a_lease_fails(desk: Desk) -> None:
    key = desk.work("r")
    failures: list[tuple[KvKey, str]] = []
    for _ in range(int(LEASE_S) + 1):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
        desk.feed(Tick(desk.now))
        failures += desk.failures()
    assert failures == [(key, "transfer_failed")]
    assert desk.state.pool.held == 0


def test_only_so_many_pulls_at_once() -> None:
    desk = Desk(blocks=64, max_batch=40).joined()
    keys = [desk.work(str(number)) for number in range(MAX_PULLS + 2)]
    assert [desk.phase(key) for key in keys] == [Phase.PULLING] * MAX_PULLS + [Phase.WAITING] * 2
    desk.land(keys[0])
    assert [desk.phase(key) for key in keys[-2:]] == [Phase.PULLING, Phase.WAITING]


def test_a_sequence_waits_for_blocks_and_nobody_overtakes_it(desk: Desk) -> None:
    desk.running("a", 40)
    large, small = desk.work("b", 30), desk.work("c", 4)
    assert (desk.phase(large), desk.phase(small)) == (Phase.WAITING, Phase.WAITING)
    desk.say("router", worker.Abort(large))
    assert desk.phase(small) is Phase.PULLING


def test_nothing_is_pulled_while_the_relay_is_away(desk: Desk) -> None:
    pulling = desk.work("a")
    desk.say("relay", worker.HelloWanted())
    assert desk.failures() == [(pulling, "transfer_failed")]
    waiting = desk.work("b")
    assert desk.phase(waiting) is Phase.WAITING
    desk.say("relay", kv.KvWelcome("relay-n0", "2", LEASE_S, "/staging", 4, 64))
    assert [pull.handle.key for pull in desk.told("relay", kv.KvPull)] == [waiting]


def test_leases_of_what_is_wanted_are_extended() -> None:
    desk = Desk(max_batch=2).joined()
    running, pulling, waiting = desk.running("a"), desk.work("b"), desk.work("c")
    assert desk.phase(running) is Phase.RUNNING
    for _ in range(10):
        desk.now += 1.0
        desk.say("relay", kv.KvPing())
        desk.ping()
    desk.feed(Tick(desk.now))
    assert desk.told("relay", kv.KvExtend) == [kv.KvExtend(((pulling, "n1"), (waiting, "n1")))]


# KV of the own node, copied before the relay's word


@pytest.fixture
def near() -> Desk:
    """On a node whose KV is always granted, never staged."""
    desk = Desk(node="n1")
    desk.joined()
    desk.say("relay", kv.KvWelcome("relay-n1", "2", LEASE_S, "/staging", 4, 64, direct=True))
    return desk


def test_a_copy_does_not_wait_for_the_grant_and_tells_of_its_end_after_it(near: Desk) -> None:
    key = near.work("r", 8)
    (pull,) = near.told("relay", kv.KvPull)
    assert near.did(CopyDirect) == [CopyDirect(pull.handle, tuple(near.state.sequences[key].blocks))]
    near.feed(CopyEnded(near.now, key, None, True))
    assert near.phase(key) is Phase.RUNNING
    assert near.told("relay", kv.KvPulled) == [], "the relay does not know of a reader yet"
    near.say("relay", kv.KvGrant(key))
    assert near.actions == [Send("relay", kv.KvPulled(key))]
    near.say("relay", kv.KvGrant(key))
    assert near.actions == []


def test_a_grant_that_comes_during_the_copy_is_answered_at_its_end(near: Desk) -> None:
    key = near.work("r", 8)
    near.say("relay", kv.KvGrant(key))
    assert near.actions == []
    near.feed(CopyEnded(near.now, key, None, True))
    assert near.told("relay", kv.KvPulled) == [kv.KvPulled(key)]


@pytest.mark.parametrize("granted_first", [False, True])
def test_a_copy_that_was_too_early_is_made_again_when_granted(near: Desk, *, granted_first: bool) -> None:
    key = near.work("r", 8)
    ended = CopyEnded(near.now, key, None, True, TransferFailed("cannot be mapped").info())
    granted = Received(near.now, "relay", kv.KvGrant(key))
    near.feed(granted if granted_first else ended)
    assert near.did(CopyDirect) == []
    near.feed(ended if granted_first else granted)
    assert len(near.did(CopyDirect)) == 1
    assert near.failures() == []
    near.feed(CopyEnded(near.now, key, None, True))
    assert near.told("relay", kv.KvPulled) == [kv.KvPulled(key)]
    assert near.phase(key) is Phase.RUNNING


def test_a_refusal_after_a_verified_copy_changes_nothing(near: Desk) -> None:
    key = near.work("r", 8)
    near.feed(CopyEnded(near.now, key, None, True))
    near.say("relay", kv.KvFailed(key, ErrorInfo("transfer_failed", "its lease is over")))
    assert near.failures() == []
    assert near.phase(key) is Phase.RUNNING


def test_an_abort_during_an_early_copy_waits_for_its_end(near: Desk) -> None:
    key = near.work("r", 8)
    near.say("router", worker.Abort(key))
    assert near.phase(key) is Phase.DOOMED
    assert near.state.pool.held == 3
    near.feed(CopyEnded(near.now, key, None, True))
    assert near.told("relay", kv.KvAbort) == [kv.KvAbort(key)]
    assert near.state.pool.held == 0


def test_nothing_is_copied_early_that_no_checksum_would_prove(near: Desk) -> None:
    near.say("relay", kv.KvWelcome("relay-n1", "3", LEASE_S, "/staging", 4, 64, verify=False, direct=True))
    near.work("r", 8)
    assert near.did(CopyDirect) == []


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
    desk.say("relay", kv.KvWelcome("relay-n0", "1", LEASE_S, "/staging", 4, 64))
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


# prompts that are read here


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
    desk.feed(CopyEnded(desk.now, copying, None, True))
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
        kv.KvChunkReady(key, kv.Chunk(0, 0, 1), 0),
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
