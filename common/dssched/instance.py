"""What the machines of prefill and decode instances have in common: links, blocks, steps under way.

A step is told to the engine as soon as its sequences are known, and up to ``stages`` steps are under way at once,
of different sequences: as many as the engine has pipeline stages, so that none of them is idle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dskv.handle import KvKey
from dssched.prefix import PrefixPool
from dssched.steps import Made, Run, RunStep, Stepped
from dswire.errors import ErrorInfo
from dswire.links import End, Link, Links, Ready
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages import PROTOCOL, kv, worker


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """What the machine of an instance must know."""

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
    #: tokens of one step; for prefill the paper's Lm
    max_batch_tokens: int
    #: steps under way at once
    stages: int = 1
    #: whether blocks are kept for prompts that begin alike
    prefix_cache: bool = True


class InstanceState(ABC):
    """Events in, actions out."""

    role: str
    config: InstanceConfig

    def __init__(self, config: InstanceConfig, *, relayed: bool = True) -> None:
        """``relayed``: whether there is a relay to say hello to."""
        layout = config.capacity.layout
        self.pool = PrefixPool(config.capacity.blocks, layout.block_size, keep=config.prefix_cache)
        #: the sequences of every step under way, by its number
        self.steps: dict[int, tuple[KvKey, ...]] = {}
        self._numbers = 0
        self.links = Links(self._router_hello, self._relay_hello, self._load, relayed=relayed)
        self._out: list[Any] = []

    # the machine's interface

    def handle(self, event: Any) -> list[Any]:
        """Take one event."""
        self._out = []
        self._out += self.links.begin(event.now)
        match event:
            case Received(now, peer, message):
                self._received(now, peer, message)
            case Tick(now):
                self._linked(now, *self.links.tick(now))
                self._tick(now)
            case PeerLost(now, peer):
                self._linked(now, *self.links.peer_lost(now, peer))
            case Stepped():
                del self.steps[event.number]
                self._stepped(event)
            case _:
                self._worked(event)
        self._admit(event.now)
        while len(self.steps) < self.config.stages and self._launch(self._next_step(event.now)):
            pass
        self.links.count(self._out)
        return self._out

    def next_deadline(self) -> float | None:
        """When to look for silence of a link, or what the instance itself waits for."""
        links, own = self.links.deadline(), self._deadline()
        return min(links, own) if links is not None and own is not None else own if links is None else links

    # what an instance adds

    @abstractmethod
    def validate(self) -> None:
        """Check every invariant."""

    @abstractmethod
    def _message(self, now: float, message: msgspec.Struct) -> None:
        """A message that is not about the connection itself."""

    @abstractmethod
    def _worked(self, event: Any) -> None:
        """A piece of work other than a step is done."""

    @abstractmethod
    def _stepped(self, step: Stepped) -> None:
        """A step is done."""

    @abstractmethod
    def _next_step(self, now: float) -> list[Run]:
        """The sequences of the next step, none of which is in a step now."""

    @abstractmethod
    def _forget_all(self, now: float) -> None:
        """The router has forgotten every sequence."""

    @abstractmethod
    def _load(self) -> worker.Load:
        """What the router is told every second."""

    def _admit(self, now: float) -> None:  # noqa: B027 (an instance need not, here and below)
        """Let in what waits."""

    def _tick(self, now: float) -> None:  # noqa: B027
        """The deadline of the instance itself may have come."""

    def _deadline(self) -> float | None:
        return None

    def _relay_joined(self, now: float) -> None:  # noqa: B027
        """The relay is there, and knows no handle of ours."""

    def _relay_lost(self, now: float) -> None:  # noqa: B027
        """The relay is gone."""

    @property
    def _lease_s(self) -> float:
        """The relay's, or its default while no relay has told."""
        return self.links.welcome.lease_s if self.links.welcome else 30.0

    # links

    def _received(self, now: float, peer: str, message: msgspec.Struct) -> None:
        linked = self.links.take(now, peer, message)
        if linked is None:
            self._message(now, message)
        else:
            self._linked(now, *linked)

    def _linked(self, now: float, sends: list[Send], links: list[Link]) -> None:
        self._out += sends
        if self.links.refused is not None:
            self._out.append(End(self.links.refused))
        for link in links:
            match link:
                case Link.ROUTER_JOINED:
                    self._out.append(Ready())
                case Link.ROUTER_LOST:
                    self._forget_all(now)
                case Link.RELAY_JOINED:
                    self._relay_joined(now)
                case Link.RELAY_LOST:
                    self._relay_lost(now)

    def _router_hello(self) -> worker.WorkerHello:
        config = self.config
        capacity = msgspec.structs.replace(config.capacity, keeps=config.prefix_cache)
        return worker.WorkerHello(
            PROTOCOL, config.name, self.role, config.node, config.incarnation, config.model, capacity
        )

    def _relay_hello(self) -> kv.KvHello:
        return kv.KvHello(PROTOCOL, self.config.name, self.config.incarnation)

    def _loaded(self, waiting: int, running: int) -> worker.Load:
        pool = self.pool
        return worker.Load(waiting, running, pool.held, prompt_tokens=pool.asked, cached_tokens=pool.found)

    def _fail_at_router(self, key: KvKey, error: ErrorInfo) -> None:
        self._out.append(Send("router", worker.SequenceFailed(key, error)))

    # steps

    def _launch(self, runs: Sequence[Run]) -> bool:
        if not runs:
            return False
        self._numbers += 1
        self.steps[self._numbers] = tuple([run.key for run in runs])
        self._out.append(RunStep(self._numbers, tuple(runs), self.repeat()))
        return True

    def repeat(self) -> int:
        """How many steps like the one under way there will be, itself included, unless something comes."""
        return 1

    # checks

    def _validate(self, held: Iterable[Sequence[int]], stepping: Iterable[KvKey]) -> None:
        """Sequences, blocks and steps agree: ``held`` by each sequence; ``stepping`` say they are in a step."""
        self.pool.validate()
        assert Counter(block for blocks in held for block in blocks) == self.pool.holders()
        under_way = [key for keys in self.steps.values() for key in keys]
        assert len(under_way) == len(set(under_way))
        assert set(under_way) == set(stepping)
        assert len(self.steps) <= self.config.stages


def results(step: Stepped) -> list[tuple[KvKey, Made | ErrorInfo]]:
    """What became of every sequence of a step, failures last."""
    return [*((made.key, made) for made in step.made), *step.failed]
