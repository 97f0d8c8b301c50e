"""Replicas that read prompts beside the sequences they decode: colocated and conditional mode, approximately.

Part of the queueing oracle (:mod:`dsplan.queueing`). While prompts wait, every step holds one token of each running
sequence and, up to a budget of tokens, chunks of prompts, first come first served (chunked prefill); between those
the decode fluid of :class:`DecodeReplica` goes on. With pipeline stages a step here is a round: every running
sequence makes one token, prompts fill the stages' batches one after the other up to the budget of each, and the
round takes as long as if all were as full as the first. A prompt is let in when the KV of its mean length is free.
Seconds and tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappush

from dsplan.queueing import DecodeReplica, DecodeUnit, PrefillUnit, Request, Served, prefilled

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

    def load(self) -> float:
        """Sequences, a prompt by its steps."""
        prompts = sum(one.left for one in self.reading) + sum(one.left for one in self.queued)
        return len(self.running) + len(self.waiting) + prompts / self.unit.budget

    def read(self, number: int, tokens: int, output: int) -> None:
        """A prompt has come."""
        self.queued.append(_Prompt(number, tokens, tokens, output))

    def advance(self, until_s: float, ends: list[float]) -> None:
        """Go on to ``until_s``, or to the end of the step that is under way then."""
        while True:
            self._let_in()
            if self.reading:
                if self.now_s >= until_s:
                    return
                self._step(ends)
            elif not self.running or not self.segment(until_s, ends):
                break
        self.now_s = max(self.now_s, until_s)

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
        stages = instance.stages
        room = max(stages * self.unit.budget - batch, stages * LEAST_CHUNK)
        tokens = squares = count = 0
        for prompt in self.reading:
            start = prompt.tokens - prompt.left
            piece = min(prompt.left, room)
            prompt.left, room = prompt.left - piece, room - piece
            tokens, squares, count = tokens + piece, squares + piece * (2 * start + piece), count + 1
            if room == 0:
                break
        first = min(1.0, max(self.unit.budget - batch / stages, LEAST_CHUNK) / tokens)
        self.now_s += stages * instance.mixed_stage_s(
            tokens * first, squares * first, count, -(-batch // stages), self.tokens / stages
        )
        self.steps += 1
        self.tokens += batch
        self.leave(ends)
        while self.reading and self.reading[0].left == 0:
            self._first_token(self.reading.pop(0), ends)

    def _first_token(self, prompt: _Prompt, ends: list[float]) -> None:
        self.firsts[prompt.number] = ends[prompt.number] = self.now_s
        if prompt.output < 2:
            self.reserved -= prompt.mean
            return
        self.tokens += prompt.tokens + 1
        entry = (self.steps + prompt.output - 1, prompt.number, prompt.tokens + prompt.output, prompt.mean)
        heappush(self.running, entry)


def serve_mixed(
    requests: Sequence[Request], prefill: Sequence[PrefillUnit], mixed: Sequence[MixedUnit], threshold: int
) -> Served:
    """Prompts of fewer than ``threshold`` tokens are read where they are decoded, the others by ``prefill``;
    without ``prefill`` all are read where they are decoded."""
    local = [not prefill or prompt < threshold for _, prompt, _ in requests]
    far = [number for number, here in enumerate(local) if not here]
    firsts = [at for at, _, _ in requests]
    arrivals = [(requests[number][0], number) for number, here in enumerate(local) if here]
    ready = list(firsts)
    if far:
        theirs, there = prefilled([requests[number] for number in far], prefill)
        for place, number in enumerate(far):
            firsts[number], ready[number] = theirs[place], there[place]
            arrivals.append((ready[number], number))
    ends = list(ready)
    replicas = [MixedReplica(unit, firsts=firsts) for unit in mixed]
    for at, number in sorted(arrivals):
        _, prompt, output = requests[number]
        if not local[number] and output < 2:
            continue
        for one in replicas:
            one.advance(at, ends)
        best = min(replicas, key=MixedReplica.load)
        if local[number]:
            best.read(number, prompt, output)
        else:
            best.push(number, prompt + 1, output - 1)
    for one in replicas:
        one.advance(float("inf"), ends)
    return _served(requests, firsts, ready, ends, local, sum(len(one.held) for one in replicas))


def _served(
    requests: Sequence[Request],
    firsts: Sequence[float],
    ready: Sequence[float],
    ends: Sequence[float],
    local: Sequence[bool],
    waits: int,
) -> Served:
    ttft = [first - one[0] for first, one in zip(firsts, requests, strict=True)]
    tpot = [
        (end - first) / (one[2] - 1) if one[2] > 1 else 0.0
        for end, first, one in zip(ends, firsts, requests, strict=True)
    ]
    transfer = [0.0 if here else at - first for at, first, here in zip(ready, firsts, local, strict=True)]
    return Served(ttft, tpot, transfer, waits)
