"""The prefill machine.

Life of a sequence here::

    QUEUED ──> RUNNING ──> SEALING ──> OFFERED ──> GONE
       │          │           │
       │          └─> DOOMED <┴──────────┘   ended while a thread or a reader uses its blocks
       └──────────────> GONE

Blocks are taken when the first step begins and given back in one place, ``_drop``. A prompt longer than a step is
read in chunks, in steps of even size. Where KV goes in parts, what a chunk has completed is offered by a handle of
its own while the next one is read; what is left goes with the last. A sequence keeps its blocks until the relay has
released every handle, or until no relay has known them for a whole lease. A release that was lost is made good by
asking for it, once a lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.shards import KvShard
from dsprefill.events import BeMet, EndSend, Meeting, Seal, Sealed, Sending, SendKv
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
    Phase.OFFERED: frozenset({Phase.DOOMED, Phase.GONE}),
    Phase.DOOMED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(InstanceConfig):
    """What a prefill machine must know."""

    #: the pools of its ranks, as the handle tells them
    shards: tuple[KvShard, ...]
    #: of these, what its relay can map
    near: kv.PoolInfo
    #: KV goes in parts, whose ends are multiples of so many tokens; 0: in one piece
    part_tokens: int = 0


@dataclass(slots=True)
class _Sequence:
    reading: Reading
    life: Lifecycle[Phase]
    blocks: tuple[int, ...] = ()
    #: part of a step that is under way
    in_step: bool = False
    #: of which a thread makes the checksum
    sealing: KvHandle | None = None
    #: that the relay has not released
    offered: dict[KvKey, KvHandle] = field(default_factory=dict)
    #: parts so far, and the tokens of which they have the KV
    parts: int = 0
    covered: int = 0
    #: to whom it is sent by a communicator
    reader: str = ""

    @property
    def key(self) -> KvKey:
        """Of the sequence, and of its last handle."""
        return self.reading.key

    @property
    def busy(self) -> bool:
        """Whether a thread or a reader may use its blocks."""
        return self.in_step or self.sealing is not None or bool(self.offered)


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
            assert phase is not Phase.SEALING or one.sealing is not None
            assert phase not in (Phase.OFFERED, Phase.DOOMED) or one.busy
            assert all(key in self._offers for key in one.offered)
        assert len(self._offers) == sum(len(one.offered) for one in everyone)
        assert set(self._unread) <= set(self.sequences)

    # messages

    def _message(self, now: float, message: msgspec.Struct) -> None:
        match message:
            case worker.PrefillWork():
                self._accept(now, message)
            case worker.Abort(key=key):
                self._abort(now, key)
            case kv.KvMeet(reader=reader, by=by):
                self._out.append(BeMet(reader, by))
            case kv.KvRelease(key=key) | kv.KvSend(key=key) | kv.KvCancelled(key=key):
                one = self._offering(key)
                if one is not None:
                    self._of_offer(one, key, now, message)

    def _of_offer(self, one: _Sequence, key: KvKey, now: float, message: msgspec.Struct) -> None:
        match message:
            case kv.KvRelease(reason=reason):
                if one.reader and reason != "pulled":
                    self._out.append(EndSend(one.reader))
                self._released(one, key, now, f"released: {reason}")
            case kv.KvSend(reader=reader, number=number):
                one.reader = reader
                self._out.append(SendKv(one.offered[key], reader, number))
            case kv.KvCancelled(result="unknown"):
                # its release was lost
                self._released(one, key, now, "unknown to the relay")

    def _forget_all(self, now: float) -> None:
        for key in list(self.sequences):
            self._abort(now, key)

    def _accept(self, now: float, work: worker.PrefillWork) -> None:
        known = self.sequences.get(work.key)
        if known is not None:
            if known.life.phase is Phase.DOOMED:
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
        if one is not None:
            self._end(one, now, "aborted")

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
                self._end(one, step.now, "step done")
            elif isinstance(result, ErrorInfo):
                self._fail_at_router(key, result)
                self.pool.distrust(one.blocks)
                self._end(one, step.now, f"step failed: {result.code}")
            elif result.token is not None:
                self._advance(one, result, result.token, step.now)
            elif self.config.part_tokens:
                self._part(one)

    def _advance(self, one: _Sequence, made: Made, token: int, now: float) -> None:
        work = one.reading.work
        self.pool.remember(one.reading.tokens, one.blocks, one.reading.chain or ())
        reason = finish_reason(token, len(work.output_ids) + 1, work.sampling, self.config.eos_ids)
        self._out.append(Send(ROUTER, one.reading.told(token, made.logprobs, reason, now)))
        if reason:
            self._end(one, now, f"finished: {reason}")
        else:
            one.life.move(Phase.SEALING, now, "step done")
            del self._unread[one.key]
            if one.sealing is None:
                self._seal(one, one.key, len(one.reading.tokens))

    # offers

    def _worked(self, event: Any) -> None:
        match event:
            case Sending(_, key, number, meeting, error):
                self._out.append(Send(RELAY, kv.KvSending(key, number, meeting, error)))
            case Meeting(_, reader, by, meeting, error):
                self._out.append(Send(RELAY, kv.KvMeeting(reader, by, meeting, error)))
            case Sealed():
                self._sealed(event)

    def _sealed(self, event: Sealed) -> None:
        now, one = event.now, self.sequences[event.key.attempt]
        assert one.sealing is not None
        handle, one.sealing = msgspec.structs.replace(one.sealing, checksum=event.checksum), None
        if one.life.phase is Phase.DOOMED:
            self._end(one, now, "sealed")
            return
        if event.error is not None:
            self._fail_at_router(one.key, event.error)
            self._end(one, now, f"not sealed: {event.error.code}")
            return
        one.offered[handle.key] = handle
        # the longer way first: it is what the sequence waits for
        self._out.append(Send(ROUTER, worker.KvSealed(handle)))
        self._offer(one, handle, now)
        if handle.key == one.key:
            one.life.move(Phase.OFFERED, now, "sealed")
        elif one.life.phase is Phase.SEALING:
            self._seal(one, one.key, len(one.reading.tokens))

    def _part(self, one: _Sequence) -> None:
        """Have what the last chunk has completed go ahead; not while the part before is being summed."""
        end = one.reading.done - one.reading.done % self.config.part_tokens
        if one.sealing is None and end > one.covered:
            one.parts += 1
            self._seal(one, KvKey(one.key.sequence, one.key.epoch, one.parts), end)

    def _seal(self, one: _Sequence, key: KvKey, end: int) -> None:
        """Have the checksum made of the tokens that no part has, up to ``end``."""
        config, start = self.config, one.covered
        layout = config.capacity.layout
        one.covered = end
        one.sealing = KvHandle(
            key=key,
            owner=config.name,
            node=config.node,
            layout=layout,
            tokens=end - start,
            blocks=one.blocks[start // layout.block_size : layout.blocks_for(end)],
            shards=config.shards,
            segment_blocks=config.capacity.blocks,
            checksum=0,
            start=start,
        )
        self._out.append(Seal(key, one.sealing.blocks))

    def _offering(self, key: KvKey) -> _Sequence | None:
        one = self.sequences.get(key.attempt)
        return one if one is not None and key in one.offered else None

    def _released(self, one: _Sequence, key: KvKey, now: float, why: str) -> None:
        """Nobody will read that any more."""
        del one.offered[key]
        self._offers.cancel(key)
        if one.life.phase is Phase.DOOMED or (one.life.phase is Phase.OFFERED and not one.offered):
            self._end(one, now, why)

    def _relay_joined(self, now: float) -> None:
        for one in self.sequences.values():
            for handle in one.offered.values():
                self._offer(one, handle, now, again=True)

    _relay_lost = _relay_joined

    def _offer(self, one: _Sequence, handle: KvHandle, now: float, *, again: bool = False) -> None:
        """Offer, for the first time or again; while no relay is there it only begins to run out of patience.

        Whoever wants what is offered again will say so; else it goes as soon as it would have gone.
        """
        joined = self.links.relay.joined
        self._offers.set(handle.key, now + (self._lease_s if joined else self._patience_s))
        if joined:
            self._out.append(Send(RELAY, kv.KvOffer(handle, self._patience_s if again else None)))
            if one.life.phase is Phase.DOOMED:
                self._out.append(Send(RELAY, kv.KvWithdraw(handle.key)))

    def _tick(self, now: float) -> None:
        for key in self._offers.due(now):
            one, why = self.sequences[key.attempt], "no relay for a whole lease"
            if self.links.relay.joined:
                self._offers.set(key, now + self._lease_s)
                withdrawn = one.life.phase is Phase.DOOMED
                self._out.append(Send(RELAY, kv.KvWithdraw(key) if withdrawn else kv.KvHeld(key)))
                continue
            self._fail_at_router(one.key, TransferFailed(f"the relay of node {self.config.node} is down").info())
            self._released(one, key, now, why)
            if one.life.phase not in (Phase.DOOMED, Phase.GONE):
                self._end(one, now, why)

    def _deadline(self) -> float | None:
        return self._offers.next()

    @property
    def _patience_s(self) -> float:
        """How long to wait for another relay: a lease in all, the silence of the last one included."""
        return max(self._lease_s - RELAY_SILENCE_S, 1.0)

    # ends

    def _end(self, one: _Sequence, now: float, why: str) -> None:
        """End a sequence, at once or as soon as nobody uses its blocks. Ending it again is harmless."""
        if not one.busy:
            self._drop(one, now, why)
        elif one.life.phase is not Phase.DOOMED:
            one.life.move(Phase.DOOMED, now, why)
            self._unread.pop(one.key, None)
            # the relay answers with KvRelease as soon as nobody reads the blocks
            self._out += [Send(RELAY, kv.KvWithdraw(key)) for key in one.offered]

    def _drop(self, one: _Sequence, now: float, why: str) -> None:
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        if one.blocks:
            self._out.append(ForgetSequence(one.key))
        del self.sequences[one.key]
        self._unread.pop(one.key, None)

    # what others are told of us

    def _relay_hello(self) -> kv.KvHello:
        return msgspec.structs.replace(super()._relay_hello(), pool=self.config.near)

    def _load(self) -> worker.Load:
        waiting = sum(one.life.phase is Phase.QUEUED for one in self._unread.values())
        return self._loaded(waiting, len(self._unread) - waiting)
