"""How a choice goes through prefill and decode, and what happens when an attempt is lost. Pure.

Exactly once: a token counts only when its key is that of the current attempt and its position is the next one,
so late messages of earlier attempts and repeated ones change nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from math import inf

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrouter.config import RouterConfig
from dsrouter.keeping import Keeping
from dsrouter.request import Choice, Phase, Request
from dsrouter.sink import Sink
from dsrouter.waiting import Waiting
from dsrouter.workers import Among, Worker, Workers
from dssched.dispatch import reads_locally, sending_tokens
from dssched.prefix import digests
from dswire.errors import DsError, ErrorInfo, NoInstance, WorkerLost, from_info
from dswire.messages import worker
from dswire.messages.client import Output, TokenLogprob
from dswire.messages.worker import Logprobs

#: how long a choice waits while no instance of the role that it needs is up, in seconds
INSTANCE_WAIT_S = 30.0


class Flow:
    """Moves choices along."""

    def __init__(self, workers: Workers, sink: Sink, config: RouterConfig) -> None:
        self.workers = workers
        self._sink = sink
        self._config = config
        self.keeping = Keeping(workers, sink.send, on=config.keep_extend_s > 0)
        #: sequences that one instance of each role is given; the rest waits here, in order
        self._limits = {"prefill": config.max_prefill_queue, "decode": config.max_decode_queue}
        #: every choice that is not DONE, by sequence id, with its request
        self.choices: dict[str, tuple[Request, Choice]] = {}
        #: those that wait for an instance
        self._waiting = Waiting(workers, config.reach)
        self._epochs = count()

    def validate(self) -> None:
        """Phases, queues and registry agree."""
        for sequence, (request, choice) in self.choices.items():
            phase = choice.life.phase
            assert request.live
            assert phase is not Phase.DONE
            placing = phase is Phase.PLACING and choice.handle is not None
            self._waiting.validate(sequence, queued=phase is Phase.QUEUED, placing=placing)
            assert phase is not Phase.DECODING or choice.decode is not None
            assert phase is Phase.DECODING or choice.decode is None or choice.told
        for one in self.workers:
            assert set(one.sequences) <= set(self.choices)
            assert one.tokens == sum(one.sequences.values())
            assert set(one.reading) <= set(one.sequences)

    # forward

    def next_key(self, sequence: str) -> KvKey:
        """The key of a new attempt. Its epoch is never used again, so late messages match nothing."""
        return KvKey(sequence, next(self._epochs))

    def add(self, request: Request, choice: Choice) -> None:
        """A new choice waits for prefill."""
        self.choices[choice.key.sequence] = (request, choice)
        self._queue(request, choice).append(choice.key.sequence)

    def _queue(self, request: Request, choice: Choice) -> deque[str]:
        mode, threshold = self._config.mode, self._config.threshold_tokens
        tokens = _length(request, choice)
        if mode == "conditional" and tokens >= threshold:
            unread = self._unread(request, choice)
            tokens = min((unread(one) for one in self.workers.role("decode")), default=tokens)
        return self._waiting.local if reads_locally(mode, tokens, threshold) else self._waiting.queued

    def _unread(self, request: Request, choice: Choice) -> Callable[[Worker], int]:
        """How many tokens of the choice an instance would have to read."""

        def count(target: Worker) -> int:
            kept = target.kept
            found = kept.found(choice.chain(request.prompt_ids, kept.block_size)) if kept is not None else 0
            return _length(request, choice) - found

        return count

    def _sending(self, request: Request, choice: Choice) -> Callable[[Worker], int]:
        """How many tokens it is worth to send the choice's KV to an instance."""
        handle, length, affinity = choice.handles[0], _length(request, choice), self._config.node_affinity
        return lambda target: sending_tokens(length, handle.node, target.hello.node, affinity)

    def pump(self, now: float) -> None:
        """Send what can be sent."""
        for sequence in self._waiting.stranded():
            self._again(now, *self.choices[sequence], "read where its KV has somewhere to go")
        self._read_locally(now)
        self._read(now)
        for among, queue in self._waiting.placing.items():
            while queue:
                request, choice = self.choices[queue[0]]
                target = self._room_for(request, choice, among)
                if target is None:
                    break
                queue.popleft()
                self._send_decode(now, target, request, choice)

    def _read_locally(self, now: float) -> None:
        conditional = self._config.mode == "conditional"
        while self._waiting.local:
            sequence = self._waiting.local[0]
            most = self._config.threshold_tokens if conditional else inf
            unread = self._unread(*self.choices[sequence])
            target = self.workers.choose("decode", self._limits["decode"], unread, most, shares=False)
            if target is None and not conditional:
                break
            self._waiting.local.popleft()
            if target is None:
                # decode instances have enough to read
                self._waiting.queued.append(sequence)
            else:
                self._send_prefill(now, target, *self.choices[sequence])

    def _read(self, now: float) -> None:
        leading = self._waiting.leading() if self._waiting.queued else None
        while self._waiting.queued:
            request, choice = self.choices[self._waiting.queued[0]]
            unread = self._unread(request, choice)
            target = self.workers.choose("prefill", self._limits["prefill"], unread, among=leading)
            if target is None:
                break
            self._waiting.queued.popleft()
            self._send_prefill(now, target, request, choice)

    def _room_for(self, request: Request, choice: Choice, among: Among) -> Worker | None:
        """The decode instance that gets its KV, if any has room."""
        return self.workers.choose("decode", self._limits["decode"], self._sending(request, choice), among=among)

    def _send_prefill(self, now: float, target: Worker, request: Request, choice: Choice) -> None:
        choice.account.spend("router_queue_s", now)
        choice.life.move(Phase.PREFILLING, now, target.hello.name)
        choice.prefill = target.hello.name
        unread = self._unread(request, choice)(target)
        target.add(choice.key.sequence, unread if target.hello.role == "prefill" else _length(request, choice))
        if target.hello.role == "decode":
            target.reading[choice.key.sequence] = unread
        if target.kept is not None:
            target.kept.note(choice.chain(request.prompt_ids, target.kept.block_size))
        work = worker.PrefillWork(choice.key, request.prompt_ids, tuple(choice.output_ids), choice.sampling)
        self._sink.send(target.peer, work)

    def _send_decode(self, now: float, target: Worker, request: Request, choice: Choice) -> None:
        choice.account.spend("placement_s", now)
        choice.life.move(Phase.DECODING, now, target.hello.name)
        self._tell_decode(target, request, choice)

    def _tell_decode(self, target: Worker, request: Request, choice: Choice) -> None:
        """Tell ``target`` of the handles that it does not know yet; the last token goes with the last of them."""
        if choice.decode is None:
            choice.decode = target.hello.name
            target.add(choice.key.sequence, _length(request, choice))
        outputs, made = tuple(choice.output_ids), choice.life.phase is not Phase.PREFILLING
        for handle in choice.handles[choice.told :]:
            last = handle is choice.handle
            work: msgspec.Struct = worker.DecodeMore(handle, outputs[-1:] if last else ())
            if not choice.told:
                known = outputs[:-1] if made and not last else outputs
                work = worker.DecodeWork(handle, request.prompt_ids, known, choice.sampling)
            self._sink.send(target.peer, work)
            choice.told += 1

    def prefilled(self, now: float, done: worker.PrefillDone) -> None:
        """The prompt is read, and the next token made."""
        found = self._current(done.key, Phase.PREFILLING)
        if found is None:
            return
        request, choice = found
        choice.account.prefilled(now, done.queue_s, done.prefill_s)
        holder = self.workers.get(choice.prefill)
        if holder is not None and holder.hello.role == "decode":
            choice.prefill, choice.decode = None, choice.prefill
            del holder.reading[choice.key.sequence]
            holder.grow(choice.key.sequence)
            choice.life.move(Phase.DECODING, now, "token made, goes on there")
        else:
            self._leave(choice.prefill, choice)
            choice.life.move(Phase.PLACING, now, "token made")
        self._made(now, request, choice, (done.token,), done.logprobs, done.finish_reason)

    def sealed(self, now: float, handle: KvHandle) -> None:
        """The KV of a prompt can be fetched, or a part of it."""
        if handle.key.part:
            self._part_sealed(handle)
            return
        found = self._current(handle.key, Phase.PLACING)
        if found is None or found[1].handle is not None:
            return
        request, choice = found
        choice.handle = handle
        self.keeping.note(choice, handle)
        target = self.workers.get(choice.decode)
        if target is None:
            self._waiting.behind(choice.prefill).append(handle.key.sequence)
        else:
            self._send_decode(now, target, request, choice)

    def _part_sealed(self, handle: KvHandle) -> None:
        found = self._current(handle.key.attempt, Phase.PREFILLING, Phase.PLACING)
        if found is None or handle in found[1].parts:
            return
        request, choice = found
        choice.parts.append(handle)
        target = self.workers.get(choice.decode)
        if target is None and not self._waiting.behind(choice.prefill):
            # those whose prompts are read already go first
            target = self._room_for(request, choice, self._waiting.reached_from(choice.prefill))
        if target is not None:
            self._tell_decode(target, request, choice)

    def stepped(self, now: float, tokens: tuple[worker.TokenMade, ...]) -> None:
        """A decode instance made a token for each of its sequences."""
        for made in tokens:
            found = self._current(made.key, Phase.DECODING)
            if found is None or made.position != len(found[1].output_ids):
                continue
            request, choice = found
            if made.stages is not None:
                choice.account.decoding(now, made.stages)
            holder = self.workers.get(choice.decode)
            if holder is not None:
                holder.grow(made.key.sequence, 1 + len(made.more))
                if made.finish_reason and holder.kept is not None and self._config.mode != "disaggregated":
                    # the next turn of a conversation begins with this one
                    size = holder.kept.block_size
                    known = choice.digests.get(size, ())
                    holder.kept.note(digests((*request.prompt_ids, *choice.output_ids), size, known))
            self._made(now, request, choice, (made.token, *made.more), made.logprobs, made.finish_reason)

    def _made(
        self,
        now: float,
        request: Request,
        choice: Choice,
        tokens: tuple[int, ...],
        logprobs: Logprobs | None,
        reason: str,
    ) -> None:
        text, stopped = "", False
        # the token that ends an answer is no part of its text
        for number, token in enumerate(tokens if reason != "stop" else tokens[:-1]):
            part, stopped = choice.writer.push(token)
            text += part
            if stopped:
                tokens = tokens[: number + 1]
                break
        choice.output_ids += tokens
        choice.account.token_at = now
        finish = "stop" if stopped else reason
        if finish and not stopped:
            text += choice.writer.flush()
        told = (_tell(choice, tokens[-1], logprobs),) if logprobs is not None else ()
        self._sink.emit(request, Output(request.id, len(request.events), choice.number, tokens, text, told, finish))
        if finish:
            choice.finish_reason = finish
            self.stop(choice, now, f"finished: {finish}", abort=not reason)
            self._sink.choice_done(request, choice, now)

    # back

    def failed(self, now: float, key: KvKey, error: ErrorInfo) -> None:
        """A worker has dropped the sequence."""
        found = self._current(key, Phase.PREFILLING, Phase.PLACING, Phase.DECODING)
        if found is None:
            return
        request, choice = found
        # it may be the kept KV itself that is wrong
        self.keeping.drop(choice)
        cause = from_info(error)
        if cause.retryable:
            self._retry(now, request, choice, cause)
        else:
            self._sink.fail(request, cause, now)

    def preempted(self, now: float, key: KvKey) -> None:
        """A decode instance ran out of blocks, or no KV was kept; no fault of the request, so it costs no retry."""
        found = self._current(key, Phase.PREFILLING, Phase.PLACING, Phase.DECODING)
        if found is not None:
            self._again(now, *found, "preempted")

    def worker_lost(self, now: float, lost: Worker, *, alive: bool = False) -> None:
        """A worker died: whatever it held is tried again.

        That costs no retry where it lives on but has forgotten, or was a relay that was asked for kept KV.
        """
        name = lost.hello.name
        for request, choice in list(self.choices.values()):
            held = choice.decode == name or (choice.prefill == name and choice.life.phase is not Phase.DECODING)
            if not held or not request.live:
                continue
            if alive or lost.hello.role == "relay":
                self._again(now, request, choice, f"{name} has forgotten it")
            else:
                self._retry(now, request, choice, WorkerLost(f"{name} died while it held the request"))

    def _retry(self, now: float, request: Request, choice: Choice, cause: DsError) -> None:
        choice.account.retries += 1
        if choice.account.retries > self._config.retries:
            self._sink.fail(request, cause, now)
        else:
            self._again(now, request, choice, f"retry: {cause.code}")

    def _again(self, now: float, request: Request, choice: Choice, why: str) -> None:
        relay = self.keeping.at(choice)
        self._withdraw(choice, abort=True)
        choice.key = self.next_key(choice.key.sequence)
        if relay is not None:
            choice.account.resume(now)
            choice.life.move(Phase.PLACING, now, why)
            choice.prefill = relay.hello.name
            self.keeping.ask(choice, relay)
            return
        self.keeping.drop(choice)
        choice.account.read_again(now)
        choice.life.move(Phase.QUEUED, now, why)
        # it has waited before: it goes first
        self._queue(request, choice).appendleft(choice.key.sequence)

    def starve(self, now: float, down_since: Callable[[str, Among], float | None]) -> None:
        """Fail what has waited too long for a role of which no instance is up."""
        for role, among, queue in self._waiting.everything():
            since = down_since(role, among)
            if since is None:
                continue
            for sequence in list(queue):
                request, choice = self.choices.get(sequence, (None, None))
                if request is None or choice is None or now - max(since, choice.life.since) < INSTANCE_WAIT_S:
                    continue
                what = f"relay beside a {role}" if self.workers.role(role) else role
                error = NoInstance(f"no {what} instance was up for {INSTANCE_WAIT_S:.0f} s")
                self._sink.fail(request, error, now)

    # ends

    def stop(self, choice: Choice, now: float, why: str, *, abort: bool = True) -> None:
        """The choice is over; ``abort`` tells the workers to drop it."""
        self._withdraw(choice, abort=abort)
        self.keeping.drop(choice)
        choice.life.move(Phase.DONE, now, why)
        del self.choices[choice.key.sequence]

    def _withdraw(self, choice: Choice, *, abort: bool) -> None:
        """Take the choice from wherever it is."""
        sequence = choice.key.sequence
        self._waiting.remove(sequence)
        # who has parts of the KV does not know yet that there is nothing more to come
        early = choice.life.phase is not Phase.DECODING
        for name, tells in ((choice.prefill, abort), (choice.decode, abort or early)):
            self._leave(name, choice)
            holder = self.workers.get(name)
            if tells and holder is not None:
                self._sink.send(holder.peer, worker.Abort(choice.key))
        choice.prefill = choice.decode = choice.handle = None
        choice.parts.clear()
        choice.told = 0
        choice.digests.clear()

    def _leave(self, name: str | None, choice: Choice) -> None:
        holder = self.workers.get(name)
        if holder is not None:
            holder.remove(choice.key.sequence)

    def _current(self, key: KvKey, *phases: Phase) -> tuple[Request, Choice] | None:
        """The choice if ``key`` names its current attempt and it stands in one of ``phases``."""
        found = self.choices.get(key.sequence)
        if found is None or found[1].key != key or found[1].life.phase not in phases:
            return None
        return found


def _length(request: Request, choice: Choice) -> int:
    """Tokens of prompt and output so far."""
    return len(request.prompt_ids) + len(choice.output_ids)


def _tell(choice: Choice, token: int, logprobs: Logprobs) -> TokenLogprob:
    text = choice.writer.token_text
    top = tuple((other, text(other), logprob) for other, logprob in logprobs.top)
    return TokenLogprob(token, text(token), logprobs.logprob, top)
