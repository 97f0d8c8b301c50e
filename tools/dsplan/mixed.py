"""Replicas that read prompts beside the sequences they decode: colocated and conditional mode, approximately.

Part of the queueing oracle (:mod:`dsplan.queueing`). While prompts wait, every step holds one token of each running
sequence and, up to a budget of tokens, chunks of prompts, first come first served (chunked prefill); between those
the decode fluid of :class:`DecodeReplica` goes on. With pipeline stages a step here is a round: every running
sequence makes one token, prompts fill the stages' batches one after the other, each in one of them, and the round
takes as long as if all were as full as the first. A prompt is let in when the KV of its mean length is free.
Seconds and tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from dsplan.queueing import DecodeReplica, DecodeUnit, PrefillReplica, PrefillUnit, Request, Served

#: tokens of a step that are left to prompts at least, were running sequences to fill the budget
LEAST_CHUNK = 16


@dataclass(frozen=True, slots=True)
class MixedUnit(DecodeUnit):
    """How one replica works that does both."""

    #: tokens of a step, those of running sequences included
    budget: int = 512


@dataclass(slots=True)
class _Prompt:
    number: int
    tokens: int
    left: int
    output: int

    @property
    def mean(self) -> int:
        """Tokens of KV over its life."""
        return self.tokens + self.output // 2


@dataclass(slots=True)
class MixedReplica(DecodeReplica):
    """One such replica in motion; ``firsts`` takes the times of the first tokens of its own prompts."""

    unit: MixedUnit
    firsts: list[float] = field(default_factory=list)
    queued: deque[_Prompt] = field(default_factory=deque)
    reading: list[_Prompt] = field(default_factory=list)
    #: tokens of prompts in the step that ends at ``now_s``
    stepping: int = 0
    #: ``now_s`` is within a step that holds no prompts
    flowing: bool = False

    @property
    def unread(self) -> int:
        """Tokens of prompts."""
        return sum(one.left for one in self.reading) + sum(one.left for one in self.queued)

    def unread_at(self, at_s: float) -> int:
        """The same, those of a step under way included."""
        return self.unread + (self.stepping if self.now_s > at_s else 0)

    def load(self) -> float:
        """Tokens, those of prompts from their arrival on."""
        prompts = sum(one.tokens for one in self.reading) + sum(one.tokens for one in self.queued)
        return DecodeReplica.load(self) + prompts

    def read(self, number: int, tokens: int, output: int) -> None:
        """A prompt has come."""
        self.queued.append(_Prompt(number, tokens, tokens, output))

    def advance(self, until_s: float, ends: list[float]) -> None:
        """Go on to ``until_s``, or to the end of the step that is under way then."""
        while True:
            self._let_in()
            if self.reading and self.flowing:
                self.flowing = False
                self._end_step(ends)
            if self.now_s >= until_s or not (self.reading or self.running):
                break
            if self.reading:
                self._step(ends)
            elif not self.segment(until_s, ends):
                self.flowing = True
                break
        self.now_s = max(self.now_s, until_s)

    def _end_step(self, ends: list[float]) -> None:
        """A stage's step under way has half its time left, on average, before prompts get their part in one."""
        batch, part = len(self.running), 0.5 / self.unit.instance.stages
        if batch == 0:
            return
        self.now_s += self.unit.instance.decode_step_s(batch, int(self.tokens) + 1) * part
        self.steps += part
        self.tokens += batch * part
        self.leave(ends)

    def _let_in(self) -> None:
        while self.queued and len(self.running) + len(self.reading) < self.unit.max_batch:
            first = self.queued[0]
            if (self.running or self.reading) and self.reserved + first.mean > self.unit.kv_tokens:
                self.held.add(first.number)
                return
            self.reserved += first.mean
            self.reading.append(self.queued.popleft())

    def _step(self, ends: list[float]) -> None:
        """One token for all that run, and as much of the prompts as fits."""
        instance, batch = self.unit.instance, len(self.running)
        stages, unread = instance.stages, iter(self.reading)
        room = max(self.unit.budget - batch // stages, LEAST_CHUNK)
        share = -(-sum(one.left for one in self.reading) // stages)
        filled = [self._fill(unread, room, share) for _ in range(stages)]
        self.stepping = sum(tokens for tokens, _, _ in filled)
        self.now_s += stages * instance.mixed_stage_s(*max(filled), -(-batch // stages), self.tokens / stages)
        self.steps += 1
        self.tokens += batch
        self.leave(ends)
        read = [one for one in self.reading if one.left == 0]
        self.reading = [one for one in self.reading if one.left]
        for one in read:
            self._first_token(one, ends)

    @staticmethod
    def _fill(unread: Iterator[_Prompt], room: int, share: int) -> tuple[int, int, int]:
        """Chunks for one stage's batch: their tokens, squares and number. No prompt is in two batches at once, and
        none that has its ``share`` takes another, as they come one after the other."""
        tokens = squares = count = 0
        while room > 0 and tokens < share and (prompt := next(unread, None)) is not None:
            start = prompt.tokens - prompt.left
            piece = min(prompt.left, room)
            prompt.left, room = prompt.left - piece, room - piece
            tokens, squares, count = tokens + piece, squares + piece * (2 * start + piece), count + 1
        return tokens, squares, count

    def _first_token(self, prompt: _Prompt, ends: list[float]) -> None:
        self.firsts[prompt.number] = ends[prompt.number] = self.now_s
        if prompt.output < 2:
            self.reserved -= prompt.mean
            return
        self.tokens += prompt.tokens + 1
        entry = (self.steps + prompt.output - 1, prompt.number, prompt.tokens + prompt.output, prompt.mean)
        heappush(self.running, entry)


@dataclass(slots=True)
class _System:
    """Requests on their way through prefill replicas and such that do both, in order of time."""

    requests: Sequence[Request]
    ahead: list[PrefillReplica]
    behind: list[MixedReplica]
    threshold: int
    #: times of the first token, of the KV's arrival at decode, and of the end, by request
    firsts: list[float]
    ready: list[float]
    ends: list[float]
    #: read where it is decoded
    local: list[bool]
    #: by prefill replica: when its link is free
    links: list[float]
    coming: list[tuple[float, int]] = field(default_factory=list)

    def come(self, at_s: float, number: int) -> None:
        """A request has come."""
        self.until(at_s)
        _, prompt, output = self.requests[number]
        reader = self._reader(at_s, prompt)
        if reader is not None:
            self.local[number] = True
            reader.read(number, prompt, output)
            return
        place = min(range(len(self.ahead)), key=lambda i: (self.ahead[i].waiting_tokens, self.ahead[i].stages[0]))
        self.ahead[place].push(at_s, number, prompt)

    def _reader(self, at_s: float, prompt: int) -> MixedReplica | None:
        """Who reads a prompt and decodes it too; None where prefill is to read it, as the router decides that."""
        if not self.ahead:
            return min(self.behind, key=MixedReplica.load)
        if prompt >= self.threshold:
            return None
        free = [one for one in self.behind if one.unread_at(at_s) < self.threshold]
        return min(free, key=MixedReplica.load, default=None)

    def until(self, at_s: float) -> None:
        """Go on to that time."""
        for place, one in enumerate(self.ahead):
            one.advance(at_s, self.firsts)
            for number in one.done:
                seconds = self.requests[number][1] * one.unit.transfer_token_s
                self.links[place] = max(self.links[place], self.firsts[number]) + seconds
                self.ready[number] = self.ends[number] = self.links[place]
                heappush(self.coming, (self.links[place], number))
            one.done.clear()
        while self.coming and self.coming[0][0] <= at_s:
            self._join(*heappop(self.coming))
        for other in self.behind:
            other.advance(at_s, self.ends)

    def _join(self, at_s: float, number: int) -> None:
        """The KV of a sequence has come."""
        _, prompt, output = self.requests[number]
        for one in self.behind:
            one.advance(at_s, self.ends)
        if output > 1:
            min(self.behind, key=MixedReplica.load).push(number, prompt + 1, output - 1)


def serve_mixed(
    requests: Sequence[Request], prefill: Sequence[PrefillUnit], mixed: Sequence[MixedUnit], threshold: int
) -> Served:
    """Prompts of fewer than ``threshold`` tokens are read where they are decoded, while somebody there has fewer to
    read, the others by ``prefill``; without ``prefill`` all are read where they are decoded."""
    arrivals = [at for at, _, _ in requests]
    firsts = list(arrivals)
    system = _System(
        requests,
        [PrefillReplica(unit, stages=[0.0] * unit.instance.stages) for unit in prefill],
        [MixedReplica(unit, firsts=firsts) for unit in mixed],
        threshold,
        firsts,
        ready=list(arrivals),
        ends=list(arrivals),
        local=[False] * len(requests),
        links=[0.0] * len(prefill),
    )
    for number, at in enumerate(arrivals):
        system.come(at, number)
    system.until(float("inf"))
    return _served(requests, system)


def _served(requests: Sequence[Request], system: _System) -> Served:
    firsts = system.firsts
    ttft = [first - one[0] for first, one in zip(firsts, requests, strict=True)]
    tpot = [
        (end - first) / (one[2] - 1) if one[2] > 1 else 0.0
        for end, first, one in zip(system.ends, firsts, requests, strict=True)
    ]
    transfer = [
        0.0 if here else at - first for at, first, here in zip(system.ready, firsts, system.local, strict=True)
    ]
    return Served(ttft, tpot, transfer, sum(len(one.held) for one in system.behind))
