"""The workers that the router knows: who may join, who is alive, who gets the next request. Pure.

A name belongs to one live process. When another one claims it, the holder is pinged: if it cannot be reached or
does not answer within ``PROBE_S`` it is dead and the newcomer takes over, else the newcomer is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from dskv.layout import KvLayout
from dskv.reshard import difference
from dssched.dispatch import Candidate, pick
from dssched.prefix import PrefixIndex
from dswire.errors import DsError, DuplicateName, ModelMismatch, Refused, VersionMismatch
from dswire.messages import PROTOCOL
from dswire.messages.client import WorkerStatus
from dswire.messages.worker import Load, ModelIdentity, WorkerHello

#: names of some workers; None for all of them
Among = frozenset[str] | None

#: how long the holder of a name has to answer when another claims it
PROBE_S = 1.0


@dataclass(slots=True)
class Worker:
    """A registered worker."""

    hello: WorkerHello
    #: the machine's name of its connection
    peer: str
    since: float
    heard_at: float
    load: Load = field(default_factory=Load)
    #: when it told its load
    load_at: float = 0.0
    #: sequences that are there by our doing, with the tokens each stands for
    sequences: dict[str, int] = field(default_factory=dict)
    #: tokens of all of them
    tokens: int = 0
    #: those whose prompts a decode instance still reads, with the tokens of each
    reading: dict[str, int] = field(default_factory=dict)
    last_used: int = 0
    #: the beginnings of prompts that it keeps, as far as we know
    kept: PrefixIndex | None = None
    #: messages to it since its welcome and from it since its hello; pings and reports do not count
    sent: int = 0
    received: int = 0
    #: connection and hello of another process that claims this name, and until when we wait
    claim: tuple[str, WorkerHello] | None = None
    claim_until: float = 0.0

    def add(self, sequence: str, tokens: int) -> None:
        """A sequence was sent there."""
        self.sequences[sequence] = tokens
        self.tokens += tokens

    def remove(self, sequence: str) -> None:
        """A sequence is no longer there; an unknown one is no error."""
        self.tokens -= self.sequences.pop(sequence, 0)
        self.reading.pop(sequence, None)

    def grow(self, sequence: str, tokens: int = 1) -> None:
        """A sequence there has more tokens."""
        self.sequences[sequence] += tokens
        self.tokens += tokens


class Workers:
    """The registry."""

    def __init__(self, expected: Mapping[str, str], model: ModelIdentity) -> None:
        """``expected``: role of each worker in the topology, by name."""
        self._expected = expected
        self._model = model
        self._up: dict[str, Worker] = {}
        self._names: dict[str, str] = {}
        #: when each known name was last lost, for the status
        self.lost: dict[str, float] = {}
        #: nodes whose relay was lost: no KV comes out of them nor gets in until it is back
        self._cut_off: set[str] = set()
        self._chosen = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._up.values()))

    def get(self, name: str | None) -> Worker | None:
        """The live worker of that name."""
        return self._up.get(name) if name is not None else None

    def at(self, peer: str) -> Worker | None:
        """The live worker behind a connection."""
        name = self._names.get(peer)
        return self._up[name] if name is not None else None

    def role(self, role: str) -> list[Worker]:
        """The live workers of a role."""
        return [worker for worker in self._up.values() if worker.hello.role == role]

    def refusal(self, peer: str, hello: WorkerHello) -> DsError | None:
        """Why this hello cannot be accepted at all."""
        name = hello.name
        if self._names.get(peer, name) != name:
            return Refused(f"the connection of {self._names[peer]} cannot be that of {name!r} too")
        if hello.protocol != PROTOCOL:
            return VersionMismatch(f"{name} speaks protocol {hello.protocol}, the router speaks {PROTOCOL}")
        if self._expected.get(name) != hello.role:
            remedy = "start router and workers from the same topology"
            return Refused(f"the topology has no {hello.role} worker named {name!r}", remedy=remedy)
        if hello.role != "relay" and hello.model != self._model:
            return ModelMismatch(f"{name} serves {_tell(hello.model)}, the router serves {_tell(self._model)}")
        if hello.role != "relay" and (hello.capacity is None or hello.capacity.blocks < 1):
            return Refused(f"{name} has no KV pool", remedy="raise kv.memory in the topology")
        layout = self.layout()
        if layout is not None and hello.capacity is not None and difference(hello.capacity.layout, layout):
            remedy = "give every instance the same model.dtype"
            return Refused(f"the KV layout of {name} differs from that of the others", remedy=remedy)
        return None

    def layout(self) -> KvLayout | None:
        """The KV layout that all live instances share, but for its block size."""
        return next((w.hello.capacity.layout for w in self._up.values() if w.hello.capacity is not None), None)

    def join(self, now: float, peer: str, hello: WorkerHello) -> Worker:
        """Register a worker whose name is free."""
        assert hello.name not in self._up
        worker = Worker(hello, peer, now, now)
        capacity = hello.capacity
        if capacity is not None and capacity.keeps:
            worker.kept = PrefixIndex(capacity.blocks, capacity.layout.block_size)
        if hello.role == "relay":
            self._cut_off.discard(hello.node)
        self._up[hello.name] = worker
        self._names[peer] = hello.name
        self.lost.pop(hello.name, None)
        return worker

    def leave(self, now: float, worker: Worker) -> None:
        """Forget a worker that is dead or gone."""
        del self._up[worker.hello.name]
        del self._names[worker.peer]
        if worker.hello.role == "relay":
            self._cut_off.add(worker.hello.node)
        self.lost[worker.hello.name] = now

    def duplicate(self, hello: WorkerHello) -> DuplicateName:
        """The refusal of a second process under a live name."""
        return DuplicateName(f"a live {hello.role} worker is already named {hello.name!r}")

    def sharing(self, role: str, among: Among = None) -> list[Worker]:
        """The live workers of a role that can hand KV over or be handed some: those whose relay is not lost."""
        able = [worker for worker in self.role(role) if worker.hello.node not in self._cut_off]
        return able if among is None else [worker for worker in able if worker.hello.name in among]

    def choose(
        self,
        role: str,
        max_sequences: int,
        added: Callable[[Worker], int] = lambda worker: 0,
        most: float = inf,
        *,
        shares: bool = True,
        among: Among = None,
    ) -> Worker | None:
        """The worker that gets the next sequence (``dssched.dispatch``), if any has room.

        ``added``: tokens that it would have to read, or that sending KV there is worth. ``most``: only one that
        would have fewer than that to read, and has fewer than that to read now. ``shares``: it hands KV over,
        and is one of ``among``.
        """
        able = self.sharing(role, among) if shares else self.role(role)
        open_to = [(one, added(one)) for one in able if len(one.sequences) < max_sequences]
        if most < inf:
            open_to = [(one, new) for one, new in open_to if new < most and sum(one.reading.values()) < most]
        name = pick(Candidate(one.tokens + new, one.last_used, one.hello.name) for one, new in open_to)
        if name is None:
            return None
        self._chosen += 1
        self._up[name].last_used = self._chosen
        return self._up[name]

    def room(self) -> int | None:
        """Tokens that fit the smallest pool of the live instances; None when none is up."""
        capacities = [one.hello.capacity for one in self._up.values() if one.hello.capacity is not None]
        return min((one.blocks * one.layout.block_size for one in capacities), default=None)

    def forgive(self, now: float, seconds: float) -> None:
        """The silence of every worker counts for so much less."""
        for worker in self._up.values():
            worker.heard_at = min(now, worker.heard_at + seconds)

    def down_since(self, role: str, started: float, among: Among = None) -> float | None:
        """Since when no worker of the role is up, its relay included (``started`` when none ever was); None while
        one is. ``among``: of these names alone."""
        if self.sharing(role, among):
            return None
        roles = {name: self._expected[name] for name in self.lost}
        needed = [
            at
            for name, at in self.lost.items()
            if roles[name] == "relay" or (roles[name] == role and (among is None or name in among))
        ]
        return max(needed, default=started)

    def status(self, now: float) -> tuple[WorkerStatus, ...]:
        """Every worker of the topology, in its order."""
        return tuple(self._status(name, role, now) for name, role in self._expected.items())

    def _status(self, name: str, role: str, now: float) -> WorkerStatus:
        worker = self._up.get(name)
        if worker is None:
            state = "lost" if name in self.lost else "missing"
            return WorkerStatus(name, role, "", state, 0, 0, 0, 0, {}, 0.0)
        load, hello = worker.load, worker.hello
        return WorkerStatus(
            name,
            role,
            hello.node,
            "up",
            waiting=load.waiting,
            running=load.running,
            blocks=hello.capacity.blocks if hello.capacity is not None else 0,
            blocks_held=load.blocks_held,
            handles=load.handles,
            uptime_s=now - worker.since,
            report_age_s=now - max(worker.load_at, worker.since),
            prompt_tokens=load.prompt_tokens,
            cached_tokens=load.cached_tokens,
        )


def _tell(model: ModelIdentity | None) -> str:
    if model is None:
        return "no model"
    weights = f", {model.quantization} weights" if model.quantization else ""
    return f"{model.name} ({model.dtype}{weights}, {model.fingerprint[:12]})"
