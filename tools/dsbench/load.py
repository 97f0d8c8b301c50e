"""The open-loop load generator: every request is sent at its time, whatever became of those before it.

A request's times run from the moment it was to be sent. Should this process be late (the machine is busy, the event
loop is behind), the delay counts as the system's and is told, rather than left out: no coordinated omission.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from dsclient import Completion, Sampling
from dssim.records import Record
from dssim.workload import HASHED_TOKENS, Arrival
from dswire.errors import DsError

#: token ids that every vocabulary has, and that are no special tokens
TOKENS = range(256, 1024)


class Answer(Protocol):
    """What is needed of a ``dsclient.Stream``."""

    #: told once the request is accepted
    prompt_tokens: int | None

    async def result(self) -> Completion:
        """Wait for the end. Raises the request's error."""


class Asks(Protocol):
    """What is needed of a ``dsclient.AsyncClient``."""

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        deadline_s: float | None = None,
    ) -> Answer:
        """Send a request."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send."""

    arrivals: Sequence[Arrival]
    #: of the prompts; another for each run, or a prefix cache would know the prompts of the run before
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    #: a request without an end after so long fails, in seconds
    timeout_s: float = 300.0
    #: sent one after the other and over again, instead of random tokens of the wanted length
    texts: Sequence[str] = ()


@dataclass
class Progress:
    """How far a run is."""

    total: int
    sent: int = 0
    records: list[Record] = field(default_factory=list)
    #: seconds that the last request was sent late, and the most that any was
    late_s: float = 0.0
    latest_s: float = 0.0

    @property
    def open(self) -> int:
        """Requests under way."""
        return self.sent - len(self.records)


async def run(client: Asks, load: Load, progress: Progress, on_end: Callable[[Record], None]) -> None:
    """Send everything and wait for the last end; the records are in ``progress``, in order of their ends."""
    sender = _Sender(client, load, progress, on_end)
    async with asyncio.TaskGroup() as tasks:
        for number, arrival in enumerate(load.arrivals):
            await asyncio.sleep(max(0.0, sender.began_s + arrival.at_s - time.monotonic()))
            tasks.create_task(sender.ask(number, arrival), name=f"request {number}")


class _Sender:
    def __init__(self, client: Asks, load: Load, progress: Progress, on_end: Callable[[Record], None]) -> None:
        self.began_s = time.monotonic()
        self._client = client
        self._load = load
        self._progress = progress
        self._on_end = on_end

    async def ask(self, number: int, arrival: Arrival) -> None:
        """One request, from its sending to its end."""
        answer = self._send(number, arrival)
        late_s = time.monotonic() - self.began_s - arrival.at_s
        self._progress.sent += 1
        self._progress.late_s = late_s
        self._progress.latest_s = max(self._progress.latest_s, late_s)
        completion, error = None, ""
        try:
            completion = await answer.result()
        except DsError as failed:
            error = failed.code
        total_s = time.monotonic() - self.began_s - arrival.at_s
        prompt_tokens = answer.prompt_tokens or arrival.prompt_tokens
        record = _record(number, arrival, prompt_tokens, late_s, total_s, completion, error)
        self._progress.records.append(record)
        self._on_end(record)

    def _send(self, number: int, arrival: Arrival) -> Answer:
        load = self._load
        sampling = Sampling(max_tokens=arrival.output_tokens, ignore_eos=True, seed=load.seed + number)
        if load.texts:
            text = load.texts[number % len(load.texts)]
            return self._client.stream(text, sampling=sampling, deadline_s=load.timeout_s)
        ids = prompt_ids(arrival, number, load.seed)
        return self._client.stream(prompt_ids=ids, sampling=sampling, deadline_s=load.timeout_s)


def _record(
    number: int,
    arrival: Arrival,
    prompt_tokens: int,
    late_s: float,
    total_s: float,
    completion: Completion | None,
    error: str,
) -> Record:
    if completion is None:
        return Record(number, arrival.at_s, prompt_tokens, 0, None, total_s, error, None)
    return Record(
        number=number,
        at_s=arrival.at_s,
        prompt_tokens=prompt_tokens,
        output_tokens=completion.usage.completion_tokens,
        first_s=late_s + completion.ttft_s,
        total_s=late_s + completion.total_s,
        error="",
        ledger=completion.ledger,
    )


def prompt_ids(arrival: Arrival, number: int, seed: int) -> tuple[int, ...]:
    """Tokens of a prompt: random by ``seed``, and the same for the same hash where the arrival has hashes."""
    if not arrival.hashes:
        return tuple(Random(f"{seed}/{number}").choices(TOKENS, k=arrival.prompt_tokens))
    ids = [token for one in arrival.hashes for token in Random(f"{seed}/{one}").choices(TOKENS, k=HASHED_TOKENS)]
    return tuple(ids[: arrival.prompt_tokens])
