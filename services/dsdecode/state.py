"""The decode machine.

Admission is first come first served: the head takes its blocks, then its KV is asked of the relay or its prompt is
read here. Every sequence whose KV is there takes part in the next step; prompts are read in the room that is left
in it, so that no token waits for a long prompt; so is what an earlier attempt made beyond KV that was kept. When
the running ones cannot all grow, the youngest give way: they are handed back to the router and prefilled again with
their output, so nothing is lost and the oldest always goes on.
"""

from __future__ import annotations

import msgspec

from dsdecode.config import MAX_PULLS
from dsdecode.pulling import PullingState
from dsdecode.refusal import refusal
from dsdecode.sequence import TRANSITIONS, Phase, Sequence, key_of, steps_alike
from dssched.batching import chunk, decode_may_admit
from dssched.finish import finish_reason
from dssched.steps import Made, Run, Stepped
from dswire.errors import ErrorInfo
from dswire.lifecycle import Lifecycle
from dswire.links import RELAY, ROUTER
from dswire.machine import Send
from dswire.messages import kv, worker


class DecodeState(PullingState):
    """Events in, actions out."""

    def validate(self) -> None:
        """Blocks and phases agree."""
        everyone = self.sequences.values()
        self._validate((one.blocks for one in everyone), (one.key for one in everyone if one.in_step))
        assert sum(map(len, self._phases.values())) == len(everyone)
        for one in everyone:
            one.validate(self.pool.block_size)
            assert self._phases[one.life.phase][one.key] is one
        assert self._unanswered.isdisjoint(self._phases[Phase.PULLING])

    # messages

    def _message(self, now: float, message: msgspec.Struct) -> None:
        match message:
            case worker.DecodeWork() | worker.PrefillWork():
                self._accept(now, message)
            case worker.Abort(key=key):
                one = self.sequences.get(key)
                if one is not None:
                    self._end(one, now, "aborted")
            case kv.KvGrant():
                self._granted(now, message)
            case kv.KvFailed(key=key, error=error):
                self._unanswered.discard(key)
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
        if one.handle is not None and self._extend_at is None:
            self._extend_at = now + self._extend_s

    # admission

    def _admit(self, now: float) -> None:
        while (one := self._next_in()) is not None:
            self._let_in(one, now)

    def _next_in(self) -> Sequence | None:
        """The first of those that wait, if there is room for it."""
        for one in self._phases[Phase.WAITING].values():
            if one.handle is not None and not self.links.relay.joined:
                # those whose prompts are read here need no relay
                continue
            pulling = len(self._phases[Phase.PULLING])
            inside = pulling + self._stepping
            if inside >= self.config.max_batch or (one.handle is not None and pulling >= MAX_PULLS):
                return None
            cost = self.pool.cost(one.wants(self.pool.block_size), one.known_blocks(self.pool))
            return one if decode_may_admit(cost, self.pool.free, inside) else None
        return None

    def _let_in(self, one: Sequence, now: float) -> None:
        wanted = one.wants(self.pool.block_size)
        if one.reading is None:
            assert one.handle is not None
            one.hold(self.pool.take(wanted), self.pool.block_size)
            one.transfer_wait_s = self._move(one, Phase.PULLING, now, "blocks taken")
            if self.links.early and one.handle.node == self.config.node:
                one.early = True
                self._copy(one, one.handle)
            self._out.append(Send(RELAY, kv.KvPull(one.handle)))
        else:
            one.hold(one.reading.take(self.pool, wanted, one.known_blocks(self.pool)), self.pool.block_size)
            self._move(one, Phase.PREFILLING, now, "blocks taken")
            self._start(one)

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
        if not self.config.repeats or self.config.stages > 1 or self._next_in() is not None:
            return 1
        if self._phases[Phase.PREFILLING] or self._phases[Phase.DOOMED]:
            return 1
        return steps_alike(self._phases[Phase.RUNNING].values(), self.pool)

    def _stepped(self, step: Stepped) -> None:
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
        if one.handle is not None:
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

    # what the router is told of us

    def _load(self) -> worker.Load:
        waiting = len(self._phases[Phase.WAITING]) + len(self._phases[Phase.PULLING])
        return self._loaded(waiting, self._stepping)

    @property
    def _stepping(self) -> int:
        """How many take part in steps."""
        return len(self._phases[Phase.PREFILLING]) + len(self._phases[Phase.RUNNING])
