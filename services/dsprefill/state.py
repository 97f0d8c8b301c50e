"""The prefill machine.

Life of a sequence here::

    QUEUED ──> RUNNING ──> SEALING ──> OFFERED ──> GONE
       │          │           │
       │          └─> DOOMED <┘          aborted while a thread uses its blocks
       └──────────────> GONE

Blocks are taken when the first step begins and given back in one place, ``_drop``. A prompt longer than a step is
read in chunks, in steps of even size. An offered sequence keeps its blocks until the relay releases the handle, or
until no relay has known the handle for a whole lease. A release that was lost is made good by asking for it, once a
lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.shards import KvShard
from dsprefill.events import EndSend, Seal, Sealed, Sending, SendKv
from dssched.batching import chunk
from dssched.finish import finish_reason
from dssched.instance import InstanceConfig, InstanceState, results
from dssched.reading import Reading
from dssched.steps import ForgetSequence, Made, Run, StartSequence, Stepped
from dswire.errors import DsError, ErrorInfo, InvalidRequest, Overloaded, TransferFailed
from dswire.lifecycle import Lifecycle
from dswire.links import RELAY, RELAY_SILENCE_S, ROUTER
from dswire.machine import Send
from dswire.messages import kv, worker
from dswire.timers import Timers


class Phase(Enum):
    """Where a sequence stands."""

    QUEUED = 0
    RUNNING = 1
    SEALING = 2
    OFFERED = 3
    DOOMED = 4
    GONE = 5


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.RUNNING, Phase.GONE}),
    Phase.RUNNING: frozenset({Phase.SEALING, Phase.DOOMED, Phase.GONE}),
    Phase.SEALING: frozenset({Phase.OFFERED, Phase.DOOMED, Phase.GONE}),
    Phase.OFFERED: frozenset({Phase.GONE}),
    Phase.DOOMED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(InstanceConfig):
    """What a prefill machine must know."""

    #: the pools of its ranks, as the handle tells them
    shards: tuple[KvShard, ...]


@dataclass(slots=True)
class _Sequence:
    reading: Reading
    life: Lifecycle[Phase]
    blocks: tuple[int, ...] = ()
    #: part of a step that is under way
    in_step: bool = False
    #: set from OFFERED on
    handle: KvHandle | None = None
    #: to whom it is sent by a communicator
    reader: str = ""
    #: aborted while OFFERED; said again with every offer
    withdrawn: bool = False

    @property
    def key(self) -> KvKey:
        """Of its handle."""
        return self.reading.key


class PrefillState(InstanceState):
    """Events in, actions out."""

    role = "prefill"
    config: PrefillConfig

    def __init__(self, config: PrefillConfig) -> None:
        super().__init__(config)
        self.config = config
        #: every sequence that is not GONE, in order of arrival
        self.sequences: dict[KvKey, _Sequence] = {}
        #: those of them that are QUEUED or RUNNING
        self._unread: dict[KvKey, _Sequence] = {}
        #: for each offered handle: when to ask whether it is still known, or while no relay is there, to give it up
        self._offers: Timers[KvKey] = Timers()

    def validate(self) -> None:
        """Blocks and phases agree."""
        everyone = self.sequences.values()
        self._validate((one.blocks for one in everyone), (one.key for one in everyone if one.in_step))
        for one in everyone:
            phase = one.life.phase
            assert phase is not Phase.GONE
            assert (phase in (Phase.QUEUED, Phase.RUNNING)) == (one.key in self._unread)
            assert (phase is Phase.QUEUED) == (not one.blocks)
            assert not one.in_step or phase in (Phase.RUNNING, Phase.DOOMED)
            assert phase not in (Phase.SEALING, Phase.OFFERED) or not one.reading.left
            assert (phase is Phase.OFFERED) == (one.handle is not None) == (one.key in self._offers)
        assert set(self._unread) <= set(self.sequences)

    # messages

    def _message(self, now: float, message: msgspec.Struct) -> None:
        match message:
            case worker.PrefillWork():
                self._accept(now, message)
            case worker.Abort(key=key):
                self._abort(now, key)
            case kv.KvRelease(key=key, reason=reason):
                one = self.sequences.get(key)
                if one is not None and one.life.phase is Phase.OFFERED:
                    if one.reader and reason != "pulled":
                        self._out.append(EndSend(one.reader))
                    self._drop(one, now, f"released: {reason}")
            case kv.KvSend(key=key, reader=reader, number=number):
                one = self.sequences.get(key)
                if one is not None and one.handle is not None:
                    one.reader = reader
                    self._out.append(SendKv(one.handle, reader, number))
            case kv.KvCancelled(key=key, result="unknown"):
                # its release was lost
                one = self.sequences.get(key)
                if one is not None and one.life.phase is Phase.OFFERED:
                    self._drop(one, now, "unknown to the relay")

    def _forget_all(self, now: float) -> None:
        for key in list(self.sequences):
            self._abort(now, key)

    def _accept(self, now: float, work: worker.PrefillWork) -> None:
        known = self.sequences.get(work.key)
        if known is not None:
            if known.withdrawn or known.life.phase is Phase.DOOMED:
                # a router that was restarted counts attempts anew; another attempt has another key
                self._fail_at_router(work.key, Overloaded(f"{self.config.name} still drops {work.key}").info())
            return
        reading = Reading.of(work, now)
        refusal = self._refusal(len(reading.tokens))
        if refusal is not None:
            self._fail_at_router(work.key, refusal.info())
            return
        life = Lifecycle(f"sequence {work.key}", TRANSITIONS, Phase.QUEUED, now)
        self.sequences[work.key] = self._unread[work.key] = _Sequence(reading, life)

    def _refusal(self, length: int) -> DsError | None:
        layout, blocks = self.config.capacity.layout, self.config.capacity.blocks
        waiting = sum(one.life.phase is Phase.QUEUED for one in self._unread.values())
        if waiting >= self.config.max_queue:
            return Overloaded(f"{waiting} sequences wait at {self.config.name} already")
        if layout.blocks_for(length) > blocks:
            return InvalidRequest(
                f"{length} tokens do not fit {self.config.name}, whose KV pool has room for "
                f"{blocks * layout.block_size}",
                remedy="shorten the prompt, or raise kv.memory in the topology",
            )
        return None

    def _abort(self, now: float, key: KvKey) -> None:
        one = self.sequences.get(key)
        if one is None:
            return
        match one.life.phase:
            case Phase.RUNNING | Phase.SEALING if one.in_step or one.life.phase is Phase.SEALING:
                one.life.move(Phase.DOOMED, now, "aborted")
                self._unread.pop(key, None)
            case Phase.QUEUED | Phase.RUNNING:
                self._drop(one, now, "aborted")
            case Phase.OFFERED:
                # the relay answers with KvRelease as soon as nobody reads the blocks
                one.withdrawn = True
                self._out.append(Send(RELAY, kv.KvWithdraw(key)))

    # steps

    def _next_step(self, now: float) -> list[Run]:
        room = whole = self.config.max_batch_tokens
        runs: list[Run] = []
        for one in self._unread.values():
            if one.in_step:
                continue
            known = [] if one.blocks else one.reading.known(self.pool)
            count = chunk(one.reading.left - len(known) * self.pool.block_size, room, whole)
            if len(runs) == self.config.max_batch or not count or not self._begin(one, known, now):
                break
            room -= count
            one.in_step = True
            runs.append(one.reading.read(count, one.blocks, now))
        return runs

    def _begin(self, one: _Sequence, known: list[int], now: float) -> bool:
        """Take the blocks of a sequence that has none; False while there are too few."""
        if one.blocks:
            return True
        count = self.config.capacity.layout.blocks_for(len(one.reading.tokens))
        if self.pool.cost(count, known) > self.pool.free:
            return False
        one.blocks = tuple(one.reading.take(self.pool, count, known))
        one.life.move(Phase.RUNNING, now, "blocks taken")
        work = one.reading.work
        self._out.append(StartSequence(one.key, work.prompt_ids, work.output_ids, work.sampling))
        return True

    def _stepped(self, step: Stepped) -> None:
        for key, result in results(step):
            one = self.sequences[key]
            one.in_step = False
            if one.life.phase is Phase.DOOMED:
                self._drop(one, step.now, "step done")
            elif isinstance(result, ErrorInfo):
                self._fail_at_router(key, result)
                self.pool.distrust(one.blocks)
                self._drop(one, step.now, f"step failed: {result.code}")
            elif result.token is not None:
                self._advance(one, result, result.token, step.now)

    def _advance(self, one: _Sequence, made: Made, token: int, now: float) -> None:
        work = one.reading.work
        self.pool.remember(one.reading.tokens, one.blocks, one.reading.chain or ())
        reason = finish_reason(token, len(work.output_ids) + 1, work.sampling, self.config.eos_ids)
        self._out.append(Send(ROUTER, one.reading.told(token, made.logprobs, reason, now)))
        if reason:
            self._drop(one, now, f"finished: {reason}")
        else:
            one.life.move(Phase.SEALING, now, "step done")
            del self._unread[one.key]
            self._out.append(Seal(one.key, one.blocks))

    # offers

    def _worked(self, event: Any) -> None:
        if isinstance(event, Sending):
            self._out.append(Send(RELAY, kv.KvSending(event.key, event.number, event.meeting, event.error)))
            return
        assert isinstance(event, Sealed)
        now, one = event.now, self.sequences[event.key]
        if one.life.phase is Phase.DOOMED:
            self._drop(one, now, "sealed")
            return
        if event.error is not None:
            self._fail_at_router(event.key, event.error)
            self._drop(one, now, f"not sealed: {event.error.code}")
            return
        one.life.move(Phase.OFFERED, now, "sealed")
        one.handle = self._make_handle(one, event.checksum)
        # the longer way first: it is what the sequence waits for
        self._out.append(Send(ROUTER, worker.KvSealed(one.handle)))
        self._offer(one, one.handle, now)

    def _make_handle(self, one: _Sequence, checksum: int) -> KvHandle:
        config = self.config
        return KvHandle(
            key=one.key,
            owner=config.name,
            node=config.node,
            layout=config.capacity.layout,
            tokens=len(one.reading.tokens),
            blocks=one.blocks,
            shards=config.shards,
            segment_blocks=config.capacity.blocks,
            checksum=checksum,
        )

    def _relay_joined(self, now: float) -> None:
        for one in self.sequences.values():
            if one.handle is not None:
                self._offer(one, one.handle, now, again=True)

    _relay_lost = _relay_joined

    def _offer(self, one: _Sequence, handle: KvHandle, now: float, *, again: bool = False) -> None:
        """Offer, for the first time or again; while no relay is there it only begins to run out of patience.

        Whoever wants what is offered again will say so; else it goes as soon as it would have gone.
        """
        joined = self.links.relay.joined
        self._offers.set(handle.key, now + (self._lease_s if joined else self._patience_s))
        if joined:
            self._out.append(Send(RELAY, kv.KvOffer(handle, self._patience_s if again else None)))
            if one.withdrawn:
                self._out.append(Send(RELAY, kv.KvWithdraw(handle.key)))

    def _tick(self, now: float) -> None:
        for key in self._offers.due(now):
            one = self.sequences[key]
            if self.links.relay.joined:
                self._offers.set(key, now + self._lease_s)
                self._out.append(Send(RELAY, kv.KvWithdraw(key) if one.withdrawn else kv.KvHeld(key)))
                continue
            self._fail_at_router(key, TransferFailed(f"the relay of node {self.config.node} is down").info())
            self._drop(one, now, "no relay for a whole lease")

    def _deadline(self) -> float | None:
        return self._offers.next()

    @property
    def _patience_s(self) -> float:
        """How long to wait for another relay: a lease in all, the silence of the last one included."""
        return max(self._lease_s - RELAY_SILENCE_S, 1.0)

    # ends

    def _drop(self, one: _Sequence, now: float, why: str) -> None:
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        self._offers.cancel(one.key)
        if one.blocks:
            self._out.append(ForgetSequence(one.key))
        del self.sequences[one.key]
        self._unread.pop(one.key, None)

    # what others are told of us

    def _relay_hello(self) -> kv.KvHello:
        capacity = self.config.capacity
        pool = kv.PoolInfo(capacity.layout, self.config.shards, capacity.blocks)
        return msgspec.structs.replace(super()._relay_hello(), pool=pool)

    def _load(self) -> worker.Load:
        waiting = sum(one.life.phase is Phase.QUEUED for one in self._unread.values())
        return self._loaded(waiting, len(self._unread) - waiting)
