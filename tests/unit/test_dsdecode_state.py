"""The decode machine, message by message."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest

from dsdecode.events import (
    CopyChunk,
    CopyDirect,
    CopyEnded,
    DecodeStepped,
    End,
    ForgetSequence,
    NextToken,
    Ready,
    RunDecode,
    StartSequence,
)
from dsdecode.sequence import Phase
from dsdecode.state import MAX_PULLS, Action, DecodeConfig, DecodeState, Event
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import shards
from dswire.errors import EngineFailed, ErrorInfo, KvCorrupt
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

    def __init__(self, *, blocks: int = 16, max_queue: int = 12, max_batch: int = 4) -> None:
        capacity = worker.Capacity(blocks, LAYOUT)
        config = DecodeConfig("decode-0", "n0", "1", MODEL, capacity, frozenset({0}), max_queue, max_batch)
        self.state = DecodeState(config)
        self.now = 100.0
        self.actions: list[Action] = []
        #: work and aborts that the router sent
        self.router_sent = 0

    def feed(self, event: Event) -> list[Action]:
        self.actions = self.state.handle(event)
        self.state.validate()
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Action]:
        self.router_sent += isinstance(message, worker.PrefillWork | worker.DecodeWork | worker.Abort)
        return self.feed(Received(self.now, peer, message))

    def ping(self) -> list[Action]:
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

    def land(self, key: KvKey) -> list[Action]:
        """The whole KV comes directly."""
        self.say("relay", kv.KvGrant(key))
        return self.feed(CopyEnded(self.now, key, None, True))

    def running(self, name: str, tokens: int = 6, max_tokens: int = 8) -> KvKey:
        key = self.work(name, tokens, max_tokens)
        self.land(key)
        return key

    def step(self, *keys: KvKey, token: int = 7) -> list[Action]:
        return self.feed(DecodeStepped(self.now, tuple(NextToken(key, token) for key in keys), 0.25))

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
    hello = worker.WorkerHello(PROTOCOL, "decode-0", "decode", "n0", "1", MODEL, worker.Capacity(16, LAYOUT))
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
    (run,) = desk.did(RunDecode)
    assert [(one.key, one.token, one.position, len(one.blocks)) for one in run.runs] == [(key, 50, 8, 3)]


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


def test_a_pull_of_which_nothing_is_heard_for_two_leases_fails(desk: Desk) -> None:
    key = desk.work("r")
    failures: list[tuple[KvKey, str]] = []
    for _ in range(int(2 * LEASE_S) + 11):
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
    (run,) = desk.did(RunDecode)
    assert [(one.key, one.token, one.position) for one in run.runs] == [(first, 7, 7), (second, 50, 6)]
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
    desk.feed(DecodeStepped(desk.now, (NextToken(second, 7),), 0.25, ((first, error),)))
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


# ends


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
