"""The decode machine.

Admission is first come first served: the head takes its blocks, then its KV is asked of the relay or its prompt is
read here. Every sequence whose KV is there takes part in the next step; prompts are read in the room that is left
in it, so that no token waits for a long prompt; so is what an earlier attempt made beyond KV that was kept. When
the running ones cannot all grow, the youngest give way: they are handed back to the router and prefilled again with
their output, so nothing is lost and the oldest always goes on. Nobody is let in then before a step has ended, or
what was freed for the old would go to the new. Blocks are given back in one place, ``_drop``.
"""

from __future__ import annotations

from math import inf
from typing import Any

import msgspec

from dsdecode.config import MAX_PULLS, DecodeConfig
from dsdecode.events import CopyEnded, CutStream, OwnerTried, TryOwner
from dsdecode.pulls import Pulls
from dsdecode.refusal import refusal
from dsdecode.sequence import TRANSITIONS, Phase, Sequence, key_of, steps_alike
from dskv.handle import KvKey
from dskv.lifecycle import GRACE_S
from dssched.batching import chunk, decode_may_admit
from dssched.finish import finish_reason
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, Made, Run, StartSequence, Stepped
from dswire.errors import ErrorInfo, TransferFailed
from dswire.lifecycle import Lifecycle
from dswire.links import RELAY, ROUTER
from dswire.machine import Send
from dswire.messages import kv, worker


class DecodeState(InstanceState):
    """Events in, actions out."""

    role = "decode"
    config: DecodeConfig

    def __init__(self, config: DecodeConfig) -> None:
        super().__init__(config, relayed=config.relayed)
        self.config = config
        #: every sequence that is not GONE, in order of arrival
        self.sequences: dict[KvKey, Sequence] = {}
        #: the same by phase, in the order in which they came to it
        self._phases: dict[Phase, dict[KvKey, Sequence]] = {phase: {} for phase in Phase}
        self._pulls = Pulls(config.node, self.pool.block_size, self.links, lambda action: self._out.append(action))
        #: when the leases of wanted handles are extended next
        self._extend_at: float | None = None
        #: some gave way since a step ended last
        self._short = False

    def validate(self) -> None:
        """Blocks and phases agree."""
        everyone = self.sequences.values()
        self._validate((one.blocks for one in everyone), (one.key for one in everyone if one.in_step))
        assert sum(map(len, self._phases.values())) == len(everyone)
        for one in everyone:
            one.validate(self.pool.block_size)
            assert self._phases[one.life.phase][one.key] is one
        assert self._pulls.unanswered.isdisjoint(self._phases[Phase.PULLING])

    # messages

    def _message(self, now: float, message: msgspec.Struct) -> None:
        match message:
            case worker.DecodeWork() | worker.PrefillWork():
                self._accept(now, message)
            case worker.DecodeMore(handle=handle):
                one = self.sequences.get(handle.key.attempt)
                if one is not None and one.life.phase is not Phase.DOOMED and handle not in one.handles:
                    self._more(one, message, now)
            case worker.Abort(key=key):
                one = self.sequences.get(key)
                if one is not None:
                    self._end(one, now, "aborted")
            case kv.KvTry(owner=owner, pool=pool, meeting=meeting):
                self._out.append(TryOwner(owner, pool, meeting))
            case kv.KvGrant(key=key):
                self._pulls.granted(self._pulling(key), message, now)
            case kv.KvFailed(key=key, error=error):
                self._pulls.unanswered.discard(key)
                one = self._pulling(key)
                if one is not None:
                    self._fail(one, now, error, tell_relay=False)

    def _forget_all(self, now: float) -> None:
        for one in list(self.sequences.values()):
            self._end(one, now, "router lost")

    def _accept(self, now: float, work: worker.DecodeWork | worker.PrefillWork) -> None:
        key = key_of(work)
        known = self.sequences.get(key)
        if known is not None and known.life.phase is not Phase.DOOMED:
            return
        error = refusal(work, self.config, len(self._phases[Phase.WAITING]), dropped=known is not None)
        if error is not None:
            self._fail_at_router(key, error.info())
            return
        life = Lifecycle(f"sequence {key}", TRANSITIONS, Phase.WAITING, now)
        self.sequences[key] = self._phases[Phase.WAITING][key] = one = Sequence.of(work, life, now)
        if one.handles and self._extend_at is None:
            self._extend_at = now + self._extend_s

    def _more(self, one: Sequence, message: worker.DecodeMore, now: float) -> None:
        """The next part of its KV can be pulled."""
        handle, known, size = message.handle, one.handles[-1:], self.pool.block_size
        if not known or known[0].end != handle.start or handle.start % size:
            have = known[0].end if known else 0
            error = TransferFailed(
                f"{handle.key} begins at token {handle.start}; {have} came before, in blocks of {size}"
            )
            self._fail(one, now, error.info(), tell_relay=True)
            return
        waits = one.life.phase is Phase.PULLING and one.idle
        one.more(handle, message.output_ids, now)
        if waits:
            self._pulls.begin(one, now)

    # admission

    def _admit(self, now: float) -> None:
        while (one := self._next_in()) is not None:
            self._let_in(one, now)

    def _next_in(self) -> Sequence | None:
        """The first of those that wait, if there is room for it."""
        if self._short and self.steps:
            return None
        for one in self._phases[Phase.WAITING].values():
            if one.handles and not self.links.relay.joined:
                # those whose prompts are read here need no relay
                continue
            pulling = self._phases[Phase.PULLING].values()
            inside = len(pulling) + self._stepping
            pulls = sum(not other.idle for other in pulling)
            if inside >= self.config.max_batch or (one.handles and pulls >= MAX_PULLS):
                return None
            cost = self.pool.cost(one.wants(self.pool.block_size), one.known_blocks(self.pool))
            return one if decode_may_admit(cost, self.pool.free, inside) else None
        return None

    def _let_in(self, one: Sequence, now: float) -> None:
        wanted = one.wants(self.pool.block_size)
        if one.reading is None:
            one.hold(self.pool.take(wanted), self.pool.block_size)
            one.transfer_wait_s = one.since_whole(now)
            self._move(one, Phase.PULLING, now, "blocks taken")
            self._pulls.begin(one, now)
        else:
            one.hold(one.reading.take(self.pool, wanted, one.known_blocks(self.pool)), self.pool.block_size)
            self._move(one, Phase.PREFILLING, now, "blocks taken")
            self._start(one)

    def _start(self, one: Sequence) -> None:
        """It will take part in steps."""
        self._out.append(StartSequence(one.key, one.prompt_ids, tuple(one.output_ids), one.sampling))

    # pulls

    def _worked(self, event: Any) -> None:
        if isinstance(event, OwnerTried):
            self._out.append(Send(RELAY, kv.KvTried(event.owner, event.bytes_per_s, event.error)))
            return
        assert isinstance(event, CopyEnded)
        now, one = event.now, self.sequences[event.key.attempt]
        outcome = self._pulls.ended(one, event)
        if one.life.phase is Phase.DOOMED:
            self._release_doomed(one, now)
        elif isinstance(outcome, ErrorInfo):
            self._fail(one, now, outcome, tell_relay=False)
        elif outcome and not one.idle:
            self._pulls.begin(one, now)
        elif outcome and one.whole_at is not None:
            one.transfer_s = one.since_whole(now)
            self._move(one, one.arrived(now), now, "KV verified")
            self._start(one)

    def _tick(self, now: float) -> None:
        for one in [one for one in self._phases[Phase.PULLING].values() if self._stuck_at(one) <= now]:
            error = TransferFailed(f"the relay of node {self.config.node} said nothing of {one.key} for a lease")
            self._fail(one, now, error.info(), tell_relay=True)
        if self._extend_at is None or now < self._extend_at:
            return
        early = (*self._phases[Phase.PULLING].values(), *self._phases[Phase.WAITING].values())
        wanted = tuple((handle.key, handle.node) for one in early for handle in one.handles[one.pulled :])
        self._extend_at = now + self._extend_s if self.sequences else None
        if wanted and self.links.relay.joined:
            self._out.append(Send(RELAY, kv.KvExtend(wanted)))

    def _deadline(self) -> float | None:
        if self._extend_at is None:
            return None
        return min(self._extend_at, *map(self._stuck_at, self._phases[Phase.PULLING].values()), inf)

    def _stuck_at(self, one: Sequence) -> float:
        """When the relay's last word on a pull is so old that its end must have been lost on the way.

        One that waits for more parts waits as long as prefill reads: the router ends it when that fails.
        """
        return inf if one.copies or one.idle else max(one.life.since, one.heard_at) + 3 * self._extend_s + GRACE_S

    @property
    def _extend_s(self) -> float:
        """A third of the relay's lease."""
        return self._lease_s / 3

    def _relay_lost(self, now: float) -> None:
        self._pulls.unanswered.clear()
        error = TransferFailed(f"the relay of node {self.config.node} was lost in mid-transfer").info()
        for one in list(self._phases[Phase.PULLING].values()):
            self._fail(one, now, error, tell_relay=False)

    def _pulling(self, key: KvKey) -> Sequence | None:
        """The sequence that pulls that handle now."""
        one = self.sequences.get(key.attempt)
        if one is None or one.life.phase is not Phase.PULLING or one.idle or one.handles[one.pulled].key != key:
            return None
        return one

    # steps

    def _next_step(self, now: float) -> list[Run]:
        idle = self._make_room(now)
        reading = [one for one in idle if one.life.phase is Phase.PREFILLING]
        running = [one for one in idle if one.life.phase is Phase.RUNNING] if reading else idle
        if self.config.prefill_priority and reading:
            running = []
        # each stage gets its share, so that they all have as much to do
        share = -(-len(self._phases[Phase.RUNNING]) // self.config.stages)
        runs = [self._decode(one, now) for one in running[:share]]
        # however many decode, prompts get on by a block
        room = max(self.config.max_batch_tokens - len(runs), self.pool.block_size)
        for one in reading:
            if not room:
                break
            assert one.reading is not None
            count = chunk(one.reading.left, room)
            room -= count
            one.in_step = True
            runs.append(one.reading.read(count, one.blocks, now))
        return runs

    def _make_room(self, now: float) -> list[Sequence]:
        """Those that can take a step, oldest first, the youngest having given way where blocks are too few."""
        if not self._stepping:
            return []
        phases = (Phase.PREFILLING, Phase.RUNNING)
        idle = [one for one in self.sequences.values() if not one.in_step and one.life.phase in phases]
        # a sequence that reads its prompt has all its blocks, one that decodes misses one at most
        missing = sum([one.position >= one.room for one in idle])
        while missing > self.pool.free:
            if len(idle) == 1 and self.steps:
                # those that are in a step may end with it
                return []
            victim = idle.pop()
            self._short = True
            missing -= victim.position >= victim.room
            self._out.append(Send(ROUTER, worker.Preempted(victim.key)))
            if victim.life.phase is Phase.RUNNING:
                self.pool.remember(victim.known_tokens, victim.blocks, victim.chain)
            self._drop(victim, now, "preempted")
        return idle

    def _decode(self, one: Sequence, now: float) -> Run:
        if one.fresh:
            one.decode_queue_s = now - one.life.since
        one.in_step = True
        if one.position >= one.room:
            one.hold(self.pool.take(1), self.pool.block_size)
        return Run(one.key, (one.output_ids[-1],), one.position, one.blocks, True)

    def repeat(self) -> int:
        """Steps until one ends or blocks run short; whoever finds no room now finds none before."""
        if not self.config.repeats or self.config.stages > 1 or self._short or self._next_in() is not None:
            return 1
        if self._phases[Phase.PREFILLING] or self._phases[Phase.DOOMED]:
            return 1
        return steps_alike(self._phases[Phase.RUNNING].values(), self.pool)

    def _stepped(self, step: Stepped) -> None:
        self._short = False
        tokens: list[worker.TokenMade] = []
        for made in step.made:
            one = self.sequences[made.key]
            one.in_step = False
            phase = one.life.phase
            if phase is Phase.RUNNING:
                tokens.append(self._advance(one, made, step))
            elif phase is Phase.PREFILLING:
                tokens += self._read(one, made, step)
            else:
                self._release_doomed(one, step.now)
        for key, error in step.failed:
            self._step_failed(self.sequences[key], error, step.now)
        if tokens:
            self._out.append(Send(ROUTER, worker.StepDone(tuple(tokens))))

    def _step_failed(self, one: Sequence, error: ErrorInfo, now: float) -> None:
        one.in_step = False
        if one.life.phase is Phase.DOOMED:
            self._release_doomed(one, now)
        else:
            self.pool.distrust(one.blocks)
            self._fail(one, now, error, tell_relay=False)

    def _read(self, one: Sequence, made: Made, step: Stepped) -> list[worker.TokenMade]:
        """A chunk is read; with the last comes a token."""
        if made.token is None or one.reading is None:
            return []
        if one.handles:
            self._move(one, Phase.RUNNING, step.now, "caught up")
            return [self._advance(one, made, step)]
        one.add(made.token)
        reason = finish_reason(made.token, len(one.output_ids), one.sampling, self.config.eos_ids)
        self._out.append(Send(ROUTER, one.reading.told(made.token, made.logprobs, reason, step.now)))
        self._move(one, Phase.RUNNING, step.now, "prompt read")
        self.pool.remember(one.known_tokens, one.blocks, one.chain)
        if reason:
            self._drop(one, step.now, f"finished: {reason}")
        return []

    def _advance(self, one: Sequence, made: Made, step: Stepped) -> worker.TokenMade:
        assert made.token is not None
        stages = one.stages(step.seconds) if one.fresh else None
        one.fresh = False
        one.add(made.token)
        count = len(one.output_ids)
        if made.more:
            self._go_on(one, made.more)
        reason = finish_reason(made.token, len(one.output_ids), one.sampling, self.config.eos_ids)
        if reason:
            # the next turn of a conversation begins with this one
            self.pool.remember(one.known_tokens, one.blocks, one.chain)
            self._drop(one, step.now, f"finished: {reason}")
        return worker.TokenMade(one.key, count - 1, made.token, made.logprobs, reason, stages, made.more)

    def _go_on(self, one: Sequence, tokens: tuple[int, ...]) -> None:
        """More steps were run, none of which could be its last."""
        one.add(*tokens)
        if missing := one.missing(0, self.pool.block_size):
            one.hold(self.pool.take(missing), self.pool.block_size)

    # ends

    def _fail(self, one: Sequence, now: float, error: ErrorInfo, *, tell_relay: bool) -> None:
        self._fail_at_router(one.key, error)
        self._end(one, now, f"failed: {error.code}", tell_relay=tell_relay)

    def _end(self, one: Sequence, now: float, why: str, *, tell_relay: bool = True) -> None:
        """End a sequence, at once or as soon as no thread uses its blocks. Ending it twice is harmless."""
        if one.life.phase is Phase.DOOMED:
            return
        one.abort_pull = tell_relay and one.life.phase is Phase.PULLING and not one.idle
        if one.copies or one.in_step:
            self._move(one, Phase.DOOMED, now, why)
            if one.copies and not one.early:
                self._out.append(CutStream(one.handle.key))
        else:
            self._tell_relay(one)
            self._drop(one, now, why)

    def _release_doomed(self, one: Sequence, now: float) -> None:
        if not one.copies and not one.in_step:
            self._tell_relay(one)
            self._drop(one, now, "no longer in use")

    def _tell_relay(self, one: Sequence) -> None:
        if one.abort_pull:
            self._out.append(Send(RELAY, kv.KvAbort(one.handle.key)))

    def _drop(self, one: Sequence, now: float, why: str) -> None:
        del self._phases[one.life.phase][one.key]
        one.life.move(Phase.GONE, now, why)
        self.pool.give(one.blocks)
        self._out.append(ForgetSequence(one.key))
        del self.sequences[one.key]

    def _move(self, one: Sequence, to: Phase, now: float, why: str) -> float:
        """Step to a phase that is not the last; the seconds spent in the one left."""
        left = one.life.phase
        spent_s = one.life.move(to, now, why)
        del self._phases[left][one.key]
        self._phases[to][one.key] = one
        return spent_s

    # what the router is told of us

    def _load(self) -> worker.Load:
        waiting = len(self._phases[Phase.WAITING]) + len(self._phases[Phase.PULLING])
        return self._loaded(waiting, self._stepping)

    @property
    def _stepping(self) -> int:
        """How many take part in steps."""
        return len(self._phases[Phase.PREFILLING]) + len(self._phases[Phase.RUNNING])
