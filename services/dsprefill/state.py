"""The prefill machine.

Life of a sequence here::

    QUEUED ──> RUNNING ──> SEALING ──> OFFERED ──> GONE
       │          │           │
       │          └─> DOOMED <┘          aborted while a thread uses its blocks
       └──────────────> GONE

Blocks are taken when a step begins and given back in one place, ``_drop``. An offered sequence keeps them until
the relay releases the handle, or until no relay has known the handle for a whole lease. A release that was lost
is made good by another offer after two leases, by when a handle that nobody wants would have expired. At most one
step runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.shards import KvShard
from dsprefill.events import (
    End,
    FirstToken,
    PrefillRun,
    PrefillStepped,
    Ready,
    RunPrefill,
    Seal,
    Sealed,
    StageChunk,
    Staged,
)
from dssched.batching import prefill_batch
from dssched.blocks import BlockPool
from dssched.finish import finish_reason
from dswire.errors import ErrorInfo, InvalidRequest, Overloaded, TransferFailed
from dswire.lifecycle import Lifecycle
from dswire.links import RELAY, ROUTER, Link, Links
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker
from dswire.timers import Timers

Action: TypeAlias = Send | RunPrefill | Seal | StageChunk | Ready | End
Event: TypeAlias = Received | Tick | PeerLost | PrefillStepped | Sealed | Staged


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
    Phase.SEALING: frozenset({Phase.OFFERED, Phase.DOOMED}),
    Phase.OFFERED: frozenset({Phase.GONE}),
    Phase.DOOMED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """What a prefill machine must know."""

    name: str
    node: str
    incarnation: str
    model: worker.ModelIdentity
    capacity: worker.Capacity
    eos_ids: frozenset[int]
    #: the pools of its ranks, as the handle tells them
    shards: tuple[KvShard, ...]
    #: sequences that wait
    max_queue: int
    #: sequences of one step
    max_batch: int
    #: tokens of one step, the paper's Lm
    target_tokens: int


@dataclass(slots=True)
class _Sequence:
    work: worker.PrefillWork
    life: Lifecycle[Phase]
    arrived: float
    blocks: tuple[int, ...] = ()
    #: set from OFFERED on
    handle: KvHandle | None = None
    #: aborted while OFFERED; said again with every offer
    withdrawn: bool = False
    started: float = field(default=0.0)

    @property
    def length(self) -> int:
        """Tokens to run over."""
        return len(self.work.prompt_ids) + len(self.work.output_ids)


class PrefillState:
    """Events in, actions out."""

    def __init__(self, config: PrefillConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.capacity.blocks)
        #: every sequence that is not GONE, in order of arrival
        self.sequences: dict[KvKey, _Sequence] = {}
        #: whether a step runs
        self.busy = False
        #: for each offered handle: when to offer it again, or while no relay is there, to give it up
        self._offers: Timers[KvKey] = Timers()
        self.links = Links(self._router_hello, self._relay_hello, self._load)
        self._out: list[Action] = []

    # the machine's interface

    def handle(self, event: Event) -> list[Action]:
        """Take one event."""
        self._out = []
        self._out += self.links.begin(event.now)
        match event:
            case Received(now, peer, message):
                self._message(now, peer, message)
            case Tick(now):
                self._linked(now, *self.links.tick(now))
                for key in self._offers.due(now):
                    self._overdue(self.sequences[key], now)
            case PeerLost(now, peer):
                self._linked(now, *self.links.peer_lost(now, peer))
            case PrefillStepped():
                self._stepped(event)
            case Sealed(now, key, checksum):
                self._sealed(now, key, checksum)
            case Staged(now, key, chunk):
                self._out.append(Send(RELAY, kv.KvStaged(key, chunk)))
        self._run(event.now)
        self.links.count(self._out)
        return self._out

    def next_deadline(self) -> float | None:
        """Silence of a link, or an offer without an answer."""
        return min((at for at in (self.links.deadline(), self._offers.next()) if at is not None), default=None)

    def validate(self) -> None:
        """Blocks and phases agree."""
        self.pool.validate()
        held = [block for one in self.sequences.values() for block in one.blocks]
        assert len(held) == len(set(held)) == self.pool.held
        phases = [one.life.phase for one in self.sequences.values()]
        assert Phase.GONE not in phases
        assert self.busy or Phase.RUNNING not in phases
        for one in self.sequences.values():
            assert (one.life.phase is Phase.QUEUED) == (not one.blocks)
            assert (one.life.phase is Phase.OFFERED) == (one.handle is not None) == (one.work.key in self._offers)

    # messages

    def _message(self, now: float, peer: str, message: msgspec.Struct) -> None:
        linked = self.links.take(now, peer, message)
        if linked is not None:
            self._linked(now, *linked)
            return
        match message:
            case worker.PrefillWork():
                self._accept(now, message)
            case worker.Abort(key=key):
                self._abort(now, key)
            case kv.KvRelease(key=key, reason=reason):
                one = self.sequences.get(key)
                if one is not None and one.life.phase is Phase.OFFERED:
                    self._drop(one, now, f"released: {reason}")
            case kv.KvStage(key=key, chunk=chunk, slot=slot):
                one = self.sequences.get(key)
                if one is not None and one.handle is not None:
                    self._out.append(StageChunk(one.handle, chunk, slot))

    def _linked(self, now: float, sends: list[Send], links: list[Link]) -> None:
        self._out += sends
        if self.links.refused is not None:
            self._out.append(End(self.links.refused))
        for link in links:
            if link is Link.ROUTER_JOINED:
                self._out.append(Ready())
            elif link is Link.ROUTER_LOST:
                for key in list(self.sequences):
                    self._abort(now, key)
            elif link in (Link.RELAY_JOINED, Link.RELAY_LOST):
                self._offer_all(now)

    def _accept(self, now: float, work: worker.PrefillWork) -> None:
        layout, blocks = self.config.capacity.layout, self.config.capacity.blocks
        length = len(work.prompt_ids) + len(work.output_ids)
        waiting = sum(one.life.phase is Phase.QUEUED for one in self.sequences.values())
        known = self.sequences.get(work.key)
        if known is not None:
            if known.withdrawn or known.life.phase is Phase.DOOMED:
                # a router that was restarted counts attempts anew; another attempt has another key
                self._fail(work.key, Overloaded(f"{self.config.name} still drops {work.key}").info())
        elif waiting >= self.config.max_queue:
            self._fail(work.key, Overloaded(f"{self.config.name} has {waiting} sequences waiting").info())
        elif layout.blocks_for(length) > blocks:
            have = blocks * layout.block_size
            error = InvalidRequest(
                f"{length} tokens do not fit {self.config.name}, whose KV pool has room for {have}",
                remedy="shorten the prompt, or raise kv.memory in the topology",
            )
            self._fail(work.key, error.info())
        else:
            life = Lifecycle(f"sequence {work.key}", TRANSITIONS, Phase.QUEUED, now)
            self.sequences[work.key] = _Sequence(work, life, now)

    def _abort(self, now: float, key: KvKey) -> None:
        one = self.sequences.get(key)
        if one is None:
            return
        match one.life.phase:
            case Phase.QUEUED:
                self._drop(one, now, "aborted")
            case Phase.RUNNING | Phase.SEALING:
                one.life.move(Phase.DOOMED, now, "aborted")
            case Phase.OFFERED:
                # the relay answers with KvRelease as soon as nobody reads the blocks
                one.withdrawn = True
                self._out.append(Send(RELAY, kv.KvWithdraw(key)))

    # steps

    def _run(self, now: float) -> None:
        if self.busy:
            return
        queued = [one for one in self.sequences.values() if one.life.phase is Phase.QUEUED]
        batch = prefill_batch(
            (one.length for one in queued),
            target_tokens=self.config.target_tokens,
            max_sequences=self.config.max_batch,
            free_blocks=self.pool.free,
            block_size=self.config.capacity.layout.block_size,
        )
        if batch:
            self.busy = True
            self._out.append(RunPrefill(tuple(self._begin(one, now) for one in queued[:batch])))

    def _begin(self, one: _Sequence, now: float) -> PrefillRun:
        one.life.move(Phase.RUNNING, now, "step begins")
        one.started = now
        one.blocks = tuple(self.pool.take(self.config.capacity.layout.blocks_for(one.length)))
        work = one.work
        return PrefillRun(work.key, work.prompt_ids, work.output_ids, one.blocks, work.sampling)

    def _stepped(self, step: PrefillStepped) -> None:
        self.busy = False
        for made in step.tokens:
            one = self.sequences[made.key]
            if one.life.phase is Phase.DOOMED:
                self._drop(one, step.now, "step done")
            else:
                self._advance(one, made, step)
        for key, error in step.failed:
            one = self.sequences[key]
            if one.life.phase is Phase.RUNNING:
                self._fail(key, error)
            self._drop(one, step.now, f"step failed: {error.code}")

    def _advance(self, one: _Sequence, made: FirstToken, step: PrefillStepped) -> None:
        work = one.work
        reason = finish_reason(made.token, len(work.output_ids) + 1, work.sampling, self.config.eos_ids)
        queue_s = one.started - one.arrived
        done = worker.PrefillDone(made.key, made.token, queue_s, step.seconds, made.logprobs, reason)
        self._out.append(Send(ROUTER, done))
        if reason:
            self._drop(one, step.now, f"finished: {reason}")
        else:
            one.life.move(Phase.SEALING, step.now, "step done")
            self._out.append(Seal(made.key, one.blocks))

    # offers

    def _sealed(self, now: float, key: KvKey, checksum: int) -> None:
        one = self.sequences[key]
        if one.life.phase is Phase.DOOMED:
            self._drop(one, now, "sealed")
            return
        one.life.move(Phase.OFFERED, now, "sealed")
        one.handle = self._make_handle(one, checksum)
        self._offer(one, one.handle, now)
        self._out.append(Send(ROUTER, worker.KvSealed(one.handle)))

    def _make_handle(self, one: _Sequence, checksum: int) -> KvHandle:
        config = self.config
        return KvHandle(
            key=one.work.key,
            owner=config.name,
            node=config.node,
            layout=config.capacity.layout,
            tokens=one.length,
            blocks=one.blocks,
            shards=config.shards,
            segment_blocks=config.capacity.blocks,
            checksum=checksum,
        )

    def _offer_all(self, now: float) -> None:
        for one in self.sequences.values():
            if one.handle is not None:
                self._offer(one, one.handle, now)

    def _offer(self, one: _Sequence, handle: KvHandle, now: float) -> None:
        """Offer, for the first time or again; while no relay is there it only begins to run out of patience."""
        joined = self.links.relay.joined
        self._offers.set(handle.key, now + (2.0 * self._lease_s + 1.0 if joined else self._lease_s))
        if joined:
            self._out.append(Send(RELAY, kv.KvOffer(handle)))
            if one.withdrawn:
                self._out.append(Send(RELAY, kv.KvWithdraw(handle.key)))

    def _overdue(self, one: _Sequence, now: float) -> None:
        if self.links.relay.joined and one.handle is not None:
            self._offer(one, one.handle, now)
            return
        self._fail(one.work.key, TransferFailed(f"the relay of node {self.config.node} is down").info())
        self._drop(one, now, "no relay for a whole lease")

    @property
    def _lease_s(self) -> float:
        return self.links.staging.lease_s if self.links.staging else 30.0

    # ends

    def _fail(self, key: KvKey, error: ErrorInfo) -> None:
        self._out.append(Send(ROUTER, worker.SequenceFailed(key, error)))

    def _drop(self, one: _Sequence, now: float, why: str) -> None:
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        self._offers.cancel(one.work.key)
        del self.sequences[one.work.key]

    # what others are told of us

    def _router_hello(self) -> worker.WorkerHello:
        config = self.config
        return worker.WorkerHello(
            PROTOCOL, config.name, "prefill", config.node, config.incarnation, config.model, config.capacity
        )

    def _relay_hello(self) -> kv.KvHello:
        return kv.KvHello(PROTOCOL, self.config.name, self.config.incarnation)

    def _load(self) -> worker.Load:
        waiting = sum(one.life.phase is Phase.QUEUED for one in self.sequences.values())
        running = sum(one.life.phase is Phase.RUNNING for one in self.sequences.values())
        return worker.Load(waiting=waiting, running=running, blocks_held=self.pool.held)
