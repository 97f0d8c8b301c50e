"""Queues: a fast approximation of a whole placement.

:func:`serve` is the planner's *queueing oracle*, for workloads that no closed form knows. It follows every request,
but not every message or decode step, and so is an approximation of :mod:`dssim`, not a second implementation of it:

- prefill: exact FCFS recursion over pipeline stages with unbounded buffers between them; steps by the servers' own
  :func:`dssched.batching.chunk`; the prefill pool is taken to hold whatever waits for decode;
- transfer: one link for each prefill replica, one transfer after the other;
- decode: between two joins or leaves all running sequences advance at one pace (a fluid of steps); a sequence joins
  half a step late, holds the KV of its mean length from start to end, and is never preempted.

Seconds and tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from dsplan.latency import Instance
from dssched.batching import chunk

#: (arrival, prompt tokens, output tokens)
Request = tuple[float, int, int]


@dataclass(frozen=True, slots=True)
class PrefillUnit:
    """How one prefill replica works."""

    instance: Instance
    #: Lm, the tokens a batch aims at
    target_tokens: int
    max_batch: int = 64
    #: seconds that the KV of one prompt token takes on the way to decode
    transfer_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DecodeUnit:
    """How one decode replica works."""

    instance: Instance
    #: tokens that its KV pool holds
    kv_tokens: int
    max_batch: int = 512


@dataclass(slots=True)
class Unread:
    """A prompt that waits, or is read chunk by chunk."""

    at_s: float
    number: int
    tokens: int
    left: int
    #: when its last chunk leaves the last stage
    free_s: float = 0.0


@dataclass(slots=True)
class PrefillReplica:
    """A prefill replica in motion."""

    unit: PrefillUnit
    waiting: deque[Unread] = field(default_factory=deque)
    waiting_tokens: int = 0
    stages: list[float] = field(default_factory=list)
    #: prompts whose end is known, in that order
    done: list[int] = field(default_factory=list)

    def push(self, at_s: float, number: int, tokens: int) -> None:
        """A prompt has come."""
        self.waiting.append(Unread(at_s, number, tokens, tokens))
        self.waiting_tokens += tokens

    def advance(self, until_s: float, ends: list[float]) -> None:
        """Start every step that starts before ``until_s``; writes the ends."""
        while self.waiting:
            start = max(self.stages[0], self._earliest())
            if start >= until_s:
                return
            self._step(start, ends)

    def _earliest(self) -> float:
        """When some prompt can be read on: those begun are first in the queue."""
        earliest = float("inf")
        for one in self.waiting:
            earliest = min(earliest, max(one.at_s, one.free_s))
            if one.left == one.tokens:
                break
        return earliest

    def _step(self, start_s: float, ends: list[float]) -> None:
        """By the servers' rule: whole prompts up to the target, a longer one in chunks."""
        room = whole = self.unit.target_tokens
        read: list[Unread] = []
        tokens = squares = 0
        for one in self.waiting:
            if one.at_s > start_s or len(read) == self.unit.max_batch:
                break
            if one.free_s > start_s:
                continue
            count = chunk(one.left, room, whole)
            if not count:
                break
            begin = one.tokens - one.left
            one.left, room = one.left - count, room - count
            tokens, squares = tokens + count, squares + count * (2 * begin + count)
            read.append(one)
        self.waiting_tokens -= tokens
        seconds = self.unit.instance.prefill_stage_s(tokens, squares, len(read))
        at = start_s
        for stage, free_s in enumerate(self.stages):
            at = max(at, free_s) + seconds
            self.stages[stage] = at
        for one in read:
            one.free_s = at
            if not one.left:
                self.waiting.remove(one)
                self.done.append(one.number)
                ends[one.number] = at


@dataclass(slots=True)
class DecodeReplica:
    """A decode replica in motion. ``steps`` counts decode steps since the beginning, in fractions."""

    unit: DecodeUnit
    now_s: float = 0.0
    steps: float = 0.0
    #: tokens of KV now, and those reserved
    tokens: float = 0.0
    reserved: int = 0
    #: (steps at its end, number, final tokens, reserved tokens)
    running: list[tuple[float, int, int, int]] = field(default_factory=list)
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)
    #: requests that had to wait for KV blocks
    held: set[int] = field(default_factory=set)

    def load(self) -> float:
        """Tokens, by which the router chooses."""
        return self.tokens + sum(context for _, context, _ in self.waiting)

    def push(self, number: int, context: int, steps: int) -> None:
        """The KV of a sequence has come."""
        self.waiting.append((number, context, steps))
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.unit.max_batch:
            number, context, steps = self.waiting[0]
            mean = context + steps // 2
            if self.running and self.reserved + mean > self.unit.kv_tokens:
                self.held.add(number)
                return
            self.waiting.popleft()
            self.reserved += mean
            self.tokens += context
            heappush(self.running, (self.steps + steps + 0.5, number, context + steps, mean))

    def advance(self, until_s: float, ends: list[float]) -> None:
        """Go on to ``until_s``; writes the ends."""
        while self.running and self.segment(until_s, ends):
            pass
        self.now_s = max(self.now_s, until_s)

    def segment(self, until_s: float, ends: list[float]) -> bool:
        """Go on until the first of the running leaves; False where ``until_s`` comes before."""
        batch, ahead = len(self.running), self.running[0][0] - self.steps
        pace = self.unit.instance.decode_step_s(batch, int(self.tokens + batch * ahead / 2) + 1)
        if self.now_s + ahead * pace > until_s:
            part = max(until_s - self.now_s, 0.0) / pace
            self.steps += part
            self.tokens += batch * part
            return False
        self.now_s += ahead * pace
        self.steps += ahead
        self.tokens += batch * ahead
        self.leave(ends)
        self._admit()
        return True

    def leave(self, ends: list[float]) -> None:
        """Those that have made their last token."""
        while self.running and self.running[0][0] <= self.steps:
            _, number, final, mean = heappop(self.running)
            self.tokens = max(self.tokens - final, 0.0)
            self.reserved -= mean
            ends[number] = self.now_s


@dataclass(frozen=True, slots=True)
class Served:
    """What became of each request, by its number."""

    ttft_s: list[float]
    #: (end - first token) / (output - 1); 0 for one token
    tpot_s: list[float]
    #: from the end of prefill until decode had the KV
    transfer_s: list[float]
    #: requests that decode had no blocks for when they came
    kv_waits: int


def serve(requests: Sequence[Request], prefill: Sequence[PrefillUnit], decode: Sequence[DecodeUnit]) -> Served:
    """Follow ``requests`` (by arrival) through the replicas. Without ``prefill`` prompts are ready as they arrive,
    without ``decode`` everything ends with the first token: the phases on their own, as Algorithm 1 wants them."""
    firsts, ready = prefilled(requests, prefill)
    ttft = [first - one[0] for first, one in zip(firsts, requests, strict=True)]
    transfer = [at - first for at, first in zip(ready, firsts, strict=True)]
    if not decode:
        return Served(ttft, [0.0] * len(requests), transfer, 0)
    ends, waits = _decode(requests, ready, decode)
    tpot = [
        (end - first) / (one[2] - 1) if one[2] > 1 else 0.0
        for end, first, one in zip(ends, firsts, requests, strict=True)
    ]
    return Served(ttft, tpot, transfer, waits)


def prefilled(requests: Sequence[Request], units: Sequence[PrefillUnit]) -> tuple[list[float], list[float]]:
    """Times of the first token, and of the KV's arrival at decode."""
    firsts = [at for at, _, _ in requests]
    if not units:
        return firsts, firsts
    replicas = [PrefillReplica(unit, stages=[0.0] * unit.instance.stages) for unit in units]
    where = []
    for number, (at, prompt, _) in enumerate(requests):
        for one in replicas:
            one.advance(at, firsts)
        # the servers' rule: the shortest queue in tokens, here with the running batch told by when it ends
        best = min(range(len(replicas)), key=lambda i: (replicas[i].waiting_tokens, replicas[i].stages[0]))
        replicas[best].push(at, number, prompt)
        where.append(best)
    for one in replicas:
        one.advance(float("inf"), firsts)
    return firsts, _transfers(requests, units, where, firsts)


def _transfers(
    requests: Sequence[Request], units: Sequence[PrefillUnit], where: Sequence[int], firsts: Sequence[float]
) -> list[float]:
    links, ready = [0.0] * len(units), list(firsts)
    for number in sorted(range(len(requests)), key=firsts.__getitem__):
        link = where[number]
        links[link] = max(links[link], firsts[number]) + requests[number][1] * units[link].transfer_token_s
        ready[number] = links[link]
    return ready


def _decode(
    requests: Sequence[Request], ready: Sequence[float], units: Sequence[DecodeUnit]
) -> tuple[list[float], int]:
    ends = list(ready)
    replicas = [DecodeReplica(unit) for unit in units]
    for number in sorted(range(len(requests)), key=ready.__getitem__):
        _, prompt, output = requests[number]
        if output < 2:
            continue
        for one in replicas:
            one.advance(ready[number], ends)
        min(replicas, key=DecodeReplica.load).push(number, prompt + 1, output - 1)
    for one in replicas:
        one.advance(float("inf"), ends)
    return ends, sum(len(one.held) for one in replicas)
