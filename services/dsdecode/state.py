"""The decode machine.

Admission is first come first served: the head takes its blocks, then the relay is asked for the KV. Every
sequence whose KV is there takes part in every step. When the running ones cannot all grow, the youngest give
way: they are handed back to the router and prefilled again with their output, so nothing is lost and the oldest
always goes on. Blocks are given back in one place, ``_drop``. At most one step runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from dsdecode.events import (
    CopyChunk,
    CopyDirect,
    CopyEnded,
    DecodeRun,
    DecodeStepped,
    End,
    ForgetSequence,
    NextToken,
    Ready,
    RunDecode,
    StartSequence,
)
from dsdecode.sequence import TRANSITIONS, Phase, Sequence
from dskv.handle import KvKey
from dskv.reshard import difference
from dssched.batching import decode_may_admit, preemption_victims
from dssched.blocks import BlockPool
from dssched.finish import finish_reason
from dswire.errors import DsError, ErrorInfo, InvalidRequest, Overloaded, TransferFailed
from dswire.lifecycle import Lifecycle
from dswire.links import RELAY, ROUTER, Link, Links
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker

Action: TypeAlias = Send | CopyDirect | CopyChunk | StartSequence | ForgetSequence | RunDecode | Ready | End
Event: TypeAlias = Received | Tick | PeerLost | CopyEnded | DecodeStepped

#: hand-offs that are under way at once; more would only share the same memory bandwidth
MAX_PULLS = 8


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """What a decode machine must know."""

    name: str
    node: str
    incarnation: str
    model: worker.ModelIdentity
    capacity: worker.Capacity
    eos_ids: frozenset[int]
    #: sequences that wait
    max_queue: int
    #: sequences of one step
    max_batch: int


class DecodeState:
    """Events in, actions out."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.capacity.blocks)
        #: every sequence that is not GONE, in order of arrival
        self.sequences: dict[KvKey, Sequence] = {}
        #: whether a step runs
        self.busy = False
        #: when the leases of wanted handles are extended next
        self._extend_at: float | None = None
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
                self._extend(now)
            case PeerLost(now, peer):
                self._linked(now, *self.links.peer_lost(now, peer))
            case CopyEnded():
                self._copied(event)
            case DecodeStepped():
                self._stepped(event)
        self._admit(event.now)
        self._run(event.now)
        self.links.count(self._out)
        return self._out

    def next_deadline(self) -> float | None:
        """Silence of a link, or a lease to extend."""
        return min((at for at in (self.links.deadline(), self._extend_at) if at is not None), default=None)

    def validate(self) -> None:
        """Blocks and phases agree."""
        self.pool.validate()
        held = [block for one in self.sequences.values() for block in one.blocks]
        assert len(held) == len(set(held)) == self.pool.held
        for one in self.sequences.values():
            phase = one.life.phase
            assert phase is not Phase.GONE
            assert (phase is Phase.WAITING) == (not one.blocks)
            assert one.copies == 0 or phase in (Phase.PULLING, Phase.DOOMED)
            assert not one.in_step or (self.busy and phase in (Phase.RUNNING, Phase.DOOMED))
            assert phase is not Phase.DOOMED or one.copies or one.in_step

    # messages

    def _message(self, now: float, peer: str, message: msgspec.Struct) -> None:
        linked = self.links.take(now, peer, message)
        if linked is not None:
            self._linked(now, *linked)
            return
        match message:
            case worker.DecodeWork():
                self._accept(now, message)
            case worker.Abort(key=key):
                one = self.sequences.get(key)
                if one is not None:
                    self._end(one, now, "aborted")
            case kv.KvGrant(key=key):
                one = self._pulling(key)
                if one is not None:
                    one.copies, one.heard_at = one.copies + 1, now
                    self._out.append(CopyDirect(one.work.handle, tuple(one.blocks)))
            case kv.KvChunkReady():
                self._chunk_ready(now, message)
            case kv.KvFailed(key=key, error=error):
                one = self._pulling(key)
                if one is not None:
                    self._fail(one, now, error, tell_relay=False)

    def _linked(self, now: float, sends: list[Send], links: list[Link]) -> None:
        self._out += sends
        if self.links.refused is not None:
            self._out.append(End(self.links.refused))
        for link in links:
            if link is Link.ROUTER_JOINED:
                self._out.append(Ready())
            elif link is Link.ROUTER_LOST:
                for one in list(self.sequences.values()):
                    self._end(one, now, "router lost")
            elif link is Link.RELAY_LOST:
                self._relay_lost(now)

    def _accept(self, now: float, work: worker.DecodeWork) -> None:
        key = work.handle.key
        known = self.sequences.get(key)
        if known is not None and known.life.phase is not Phase.DOOMED:
            return
        refusal = self._refusal(work) if known is None else Overloaded(f"{self.config.name} still drops {key}")
        if refusal is not None:
            self._out.append(Send(ROUTER, worker.SequenceFailed(key, refusal.info())))
            return
        life = Lifecycle(f"sequence {key}", TRANSITIONS, Phase.WAITING, now)
        self.sequences[key] = Sequence(work, life, list(work.output_ids))
        if self._extend_at is None:
            self._extend_at = now + self._extend_s

    def _refusal(self, work: worker.DecodeWork) -> DsError | None:
        name, capacity = self.config.name, self.config.capacity
        longest = len(work.prompt_ids) + work.sampling.max_tokens
        waiting = sum(one.life.phase is Phase.WAITING for one in self.sequences.values())
        if waiting >= self.config.max_queue:
            return Overloaded(f"{name} has {waiting} sequences waiting")
        if capacity.layout.blocks_for(longest) > capacity.blocks:
            room = capacity.blocks * capacity.layout.block_size
            return InvalidRequest(
                f"prompt and max_tokens are {longest} tokens, the KV pool of {name} has room for {room}",
                remedy="lower max_tokens, or raise kv.memory in the topology",
            )
        return difference(work.handle.layout, capacity.layout)

    # pulls

    def _admit(self, now: float) -> None:
        if not self.links.relay.joined:
            return
        phases = [one.life.phase for one in self.sequences.values()]
        pulling, running = phases.count(Phase.PULLING), phases.count(Phase.RUNNING)
        for one in self.sequences.values():
            if one.life.phase is not Phase.WAITING:
                continue
            # one token more than is fetched, so that the first step finds room
            blocks = self.config.capacity.layout.blocks_for(one.position + 1)
            full = pulling >= MAX_PULLS or pulling + running >= self.config.max_batch
            if full or not decode_may_admit(blocks, self.pool.free, pulling + running):
                return
            pulling += 1
            one.blocks = self.pool.take(blocks)
            one.transfer_wait_s = one.life.move(Phase.PULLING, now, "blocks taken")
            self._out.append(Send(RELAY, kv.KvPull(one.work.handle)))

    def _chunk_ready(self, now: float, ready: kv.KvChunkReady) -> None:
        one = self._pulling(ready.key)
        if one is None:
            return
        one.copies, one.heard_at = one.copies + 1, now
        handle, chunk = one.work.handle, ready.chunk
        last = chunk.first + chunk.count >= len(handle.blocks)
        self._out.append(CopyChunk(handle, tuple(one.blocks), chunk, ready.slot, last))

    def _copied(self, event: CopyEnded) -> None:
        now, one = event.now, self.sequences[event.key]
        one.copies -= 1
        if one.life.phase is Phase.DOOMED:
            self._release_doomed(one, now)
        elif event.error is not None:
            self._out.append(Send(RELAY, kv.KvPulled(one.key, event.error)))
            self._fail(one, now, event.error, tell_relay=False)
        else:
            if event.chunk is not None:
                self._out.append(Send(RELAY, kv.KvTaken(one.key, event.chunk)))
            if event.chunk is None or event.last:
                self._landed(one, now)

    def _landed(self, one: Sequence, now: float) -> None:
        one.transfer_s = one.life.move(Phase.RUNNING, now, "KV verified")
        self._out.append(Send(RELAY, kv.KvPulled(one.key)))
        work = one.work
        self._out.append(StartSequence(one.key, work.prompt_ids, work.output_ids, work.sampling))

    def _extend(self, now: float) -> None:
        if self._extend_at is None or now < self._extend_at:
            return
        wanted = tuple(
            (one.key, one.work.handle.node)
            for one in self.sequences.values()
            if one.life.phase in (Phase.WAITING, Phase.PULLING)
        )
        self._extend_at = now + self._extend_s if self.sequences else None
        for one in [one for one in self.sequences.values() if self._stuck(one, now)]:
            error = TransferFailed(f"the relay of node {self.config.node} said nothing of {one.key} for two leases")
            self._fail(one, now, error.info(), tell_relay=True)
        if wanted and self.links.relay.joined:
            self._out.append(Send(RELAY, kv.KvExtend(wanted)))

    def _stuck(self, one: Sequence, now: float) -> bool:
        """Whether the relay's last word on a pull is so old that its end must have been lost on the way."""
        pulling = one.life.phase is Phase.PULLING and not one.copies
        return pulling and now - max(one.life.since, one.heard_at) > 6 * self._extend_s

    @property
    def _extend_s(self) -> float:
        """A third of the relay's lease."""
        return (self.links.staging.lease_s if self.links.staging else 30.0) / 3

    def _relay_lost(self, now: float) -> None:
        error = TransferFailed(f"the relay of node {self.config.node} was lost in mid-transfer").info()
        for one in list(self.sequences.values()):
            if one.life.phase is Phase.PULLING:
                self._fail(one, now, error, tell_relay=False)

    def _pulling(self, key: KvKey) -> Sequence | None:
        one = self.sequences.get(key)
        return one if one is not None and one.life.phase is Phase.PULLING else None

    # steps

    def _run(self, now: float) -> None:
        if self.busy:
            return
        self._make_room(now)
        running = [one for one in self.sequences.values() if one.life.phase is Phase.RUNNING]
        if not running:
            return
        self.busy = True
        self._out.append(RunDecode(tuple(self._begin(one, now) for one in running)))

    def _make_room(self, now: float) -> None:
        running = [one for one in self.sequences.values() if one.life.phase is Phase.RUNNING]
        needs = [(self._missing(one), len(one.blocks)) for one in running]
        victims = preemption_victims(needs, self.pool.free)
        for one in running[len(running) - victims :]:
            self._out.append(Send(ROUTER, worker.Preempted(one.key)))
            self._drop(one, now, "preempted")

    def _missing(self, one: Sequence) -> int:
        return self.config.capacity.layout.blocks_for(one.position + 1) - len(one.blocks)

    def _begin(self, one: Sequence, now: float) -> DecodeRun:
        if one.fresh:
            one.decode_queue_s = now - one.life.since
        one.in_step = True
        one.blocks += self.pool.take(max(0, self._missing(one)))
        return DecodeRun(one.key, one.output_ids[-1], one.position, tuple(one.blocks))

    def _stepped(self, step: DecodeStepped) -> None:
        self.busy = False
        made: list[worker.TokenMade] = []
        for token in step.tokens:
            one = self._out_of_step(token.key, step.now)
            if one is None:
                continue
            made.append(self._advance(one, token, step.seconds))
            if made[-1].finish_reason:
                self._drop(one, step.now, f"finished: {made[-1].finish_reason}")
        if made:
            self._out.append(Send(ROUTER, worker.StepDone(tuple(made))))
        for key, error in step.failed:
            one = self._out_of_step(key, step.now)
            if one is not None:
                self._fail(one, step.now, error, tell_relay=False)

    def _out_of_step(self, key: KvKey, now: float) -> Sequence | None:
        """The sequence after its step; None when it was doomed meanwhile, and is gone now."""
        one = self.sequences[key]
        one.in_step = False
        if one.life.phase is Phase.DOOMED:
            self._release_doomed(one, now)
            return None
        return one

    def _advance(self, one: Sequence, token: NextToken, seconds: float) -> worker.TokenMade:
        stages = one.stages(seconds) if one.fresh else None
        one.fresh = False
        one.output_ids.append(token.token)
        made = len(one.output_ids)
        reason = finish_reason(token.token, made, one.work.sampling, self.config.eos_ids)
        return worker.TokenMade(one.key, made - 1, token.token, token.logprobs, reason, stages)

    # ends

    def _fail(self, one: Sequence, now: float, error: ErrorInfo, *, tell_relay: bool) -> None:
        self._out.append(Send(ROUTER, worker.SequenceFailed(one.key, error)))
        self._end(one, now, f"failed: {error.code}", tell_relay=tell_relay)

    def _end(self, one: Sequence, now: float, why: str, *, tell_relay: bool = True) -> None:
        """End a sequence, at once or as soon as no thread uses its blocks. Ending it twice is harmless."""
        phase = one.life.phase
        if phase is Phase.DOOMED:
            return
        one.abort_pull = tell_relay and phase is Phase.PULLING
        if one.copies or one.in_step:
            one.life.move(Phase.DOOMED, now, why)
        else:
            self._tell_relay(one)
            self._drop(one, now, why)

    def _release_doomed(self, one: Sequence, now: float) -> None:
        if not one.copies and not one.in_step:
            self._tell_relay(one)
            self._drop(one, now, "no longer in use")

    def _tell_relay(self, one: Sequence) -> None:
        if one.abort_pull:
            self._out.append(Send(RELAY, kv.KvAbort(one.key)))

    def _drop(self, one: Sequence, now: float, why: str) -> None:
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        self._out.append(ForgetSequence(one.key))
        del self.sequences[one.key]

    # what others are told of us

    def _router_hello(self) -> worker.WorkerHello:
        config = self.config
        return worker.WorkerHello(
            PROTOCOL, config.name, "decode", config.node, config.incarnation, config.model, config.capacity
        )

    def _relay_hello(self) -> kv.KvHello:
        return kv.KvHello(PROTOCOL, self.config.name, self.config.incarnation)

    def _load(self) -> worker.Load:
        phases = [one.life.phase for one in self.sequences.values()]
        waiting = phases.count(Phase.WAITING) + phases.count(Phase.PULLING)
        return worker.Load(waiting=waiting, running=phases.count(Phase.RUNNING), blocks_held=self.pool.held)
