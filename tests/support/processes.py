"""The four services as modelled processes: a real machine, and a shell that performs its actions in virtual time.

Like the real shells they run steps one at a time and copies one after the other. They also watch what machines
cannot see: that every step and every copy reads the KV that it must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

import msgspec

from dskv.handle import KvKey
from dsrelay.events import CloseStream, Complain, CopyKept, KeptCopied, OpenStream
from dsrelay.state import RelayState
from dsrouter.events import Note, Tokenize, Tokenized
from dsrouter.state import RouterState
from dswire.errors import ErrorInfo, TransferFailed
from dswire.links import End, Ready
from dswire.machine import Machine, PeerLost, Received, Send, Tick
from dswire.messages import kv
from support.kv_memory import KvMemory, read, torn
from support.script import VOCAB, Script
from support.virtual_clock import VirtualClock
from support.wires import Wire, Wires


@dataclass(frozen=True, slots=True)
class Pace:
    """How long work takes, in seconds; each piece takes half to one and a half times as long."""

    tokenize_s: float = 0.001
    prefill_s: float = 0.02
    seal_s: float = 0.002
    copy_s: float = 0.01
    cut_s: float = 0.001
    meet_s: float = 0.003
    keep_s: float = 0.01
    step_s: float = 0.01


class World(Protocol):
    """What the processes share."""

    clock: VirtualClock
    random: Random
    wires: Wires
    memory: KvMemory
    script: Script
    pace: Pace
    #: sequence -> what its next prefill step ends with
    prefill_errors: dict[str, ErrorInfo]

    #: good now: token -> the relay that gave it
    tickets: dict[bytes, Process]
    #: where an owner is met -> that one
    meetings: dict[str, Process]

    def note(self, line: str) -> None:
        """Add to the trace."""

    def ended(self, process: Process, error: ErrorInfo) -> None:
        """A process ends by itself."""

    def finish(self, kind: str, end: Callable[[], None]) -> None:
        """A piece of work is done; what follows may be held back."""


class Process:
    """One incarnation of a process."""

    def __init__(self, world: World, name: str, incarnation: str, machine: Machine) -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.machine = machine
        self.alive = True
        self.ready = False
        #: as a bound side: connections by this machine's name for the peer
        self.peers: dict[str, Wire] = {}
        #: as a dealer: connections by this machine's name for the peer
        self.links: dict[str, Wire] = {}
        #: when the copy thread is free
        self._copies_at = 0.0
        self._tick_at: float | None = None
        #: stopped until then
        self.stalled_until = 0.0

    @property
    def segment(self) -> str:
        """Path of its pool."""
        return f"/shm/{self.name}/{self.incarnation}"

    @property
    def now(self) -> float:
        """The time."""
        return self.world.clock.now

    def take(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come."""
        self._when_awake(lambda: self.feed(Received(self.now, peer, message)))

    def feed(self, event: Any) -> None:
        """Give the machine an event and perform what it wants, as ``dswire.actor`` does."""
        lost: list[str] = []
        self.world.note(f"{self.name}/{self.incarnation} {event}")
        for action in self.machine.handle(event):
            if isinstance(action, Send):
                self.send(action.peer, action.message, lost)
            else:
                self.perform(action, lost)
        self.machine.validate()
        for peer in lost:
            self.feed(PeerLost(self.now, peer))
        self._arm()

    def send(self, peer: str, message: msgspec.Struct, lost: list[str]) -> None:
        """Send on the right connection."""
        link = self.links.get(peer)
        if link is not None:
            self.world.wires.to_bound(link, message)
        elif not self.world.wires.to_dealer(self, peer, message) and peer not in lost:
            lost.append(peer)

    def perform(self, action: Any, lost: list[str]) -> None:
        """Perform an action of the service."""
        raise TypeError(f"{self.name} cannot perform {action!r}")

    def work(self, kind: str, make: Callable[[], Any]) -> None:
        """Do a piece of work (a field of :class:`Pace`), then feed what ``make`` returns unless it is None."""
        self._later(kind, self.now + self._about(kind), make)

    def copy(self, kind: str, make: Callable[[], Any]) -> None:
        """The same, after the copies that were asked for before."""
        self._copies_at = max(self.now, self._copies_at) + self._about(kind)
        self._later(kind, self._copies_at, make)

    def _about(self, kind: str) -> float:
        seconds: float = getattr(self.world.pace, f"{kind}_s")
        return seconds * self.world.random.uniform(0.5, 1.5)

    def _later(self, kind: str, when: float, make: Callable[[], Any]) -> None:
        def end() -> None:
            event = make() if self.alive else None
            if event is not None:
                # its time is when it is looked at, as with a task of the real loop that a stopped process resumes
                self._when_awake(lambda: self.feed(replace(event, now=self.now)))

        self.world.clock.at(when, lambda: self.world.finish(kind, end))

    def _when_awake(self, call: Callable[[], None]) -> None:
        if self.stalled_until > self.now:
            self.world.clock.at(self.stalled_until, lambda: call() if self.alive else None)
        else:
            call()

    def _arm(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline != self._tick_at:
            self._tick_at = deadline
            self.world.clock.at(deadline, lambda: self._when_awake(lambda: self._tick(deadline)))

    def _tick(self, deadline: float) -> None:
        if not self.alive or self._tick_at != deadline:
            return
        self._tick_at = None
        if self.machine.next_deadline() == deadline:
            self.feed(Tick(self.now))
            after = self.machine.next_deadline()
            assert after is None or after > self.now, f"{self.name} would tick for ever"
        else:
            self._arm()


class RouterProcess(Process):
    """The router; its tokenizer makes one token of each character."""

    machine: RouterState

    def perform(self, action: Any, lost: list[str]) -> None:
        """Tokenise; nobody reads a log here."""
        if isinstance(action, Note):
            return
        if not isinstance(action, Tokenize):
            super().perform(action, lost)
        text = action.submit.prompt or "".join(turn.content for turn in action.submit.chat or ())
        ids = tuple(ord(char) % VOCAB for char in text)
        self.work("tokenize", lambda: Tokenized(self.now, action.submit, ids))


class RelayProcess(Process):
    """The relay of a node."""

    machine: RelayState

    def __init__(self, world: World, name: str, incarnation: str, machine: Machine) -> None:
        super().__init__(world, name, incarnation, machine)
        self._tokens: dict[KvKey, bytes] = {}
        self._given = 0

    def perform(self, action: Any, lost: list[str]) -> None:
        """Tickets, and copies that are kept."""
        match action:
            case OpenStream(peer, handle, number):
                self._given += 1
                token = f"{self.name}/{self.incarnation}/{self._given}".encode()
                self._tokens[handle.key] = token
                self.world.tickets[token] = self
                self.send(peer, kv.KvFetchGranted(handle.key, kv.Ticket(token), number), lost)
            case CloseStream(key):
                del self.world.tickets[self._tokens.pop(key)]
            case CopyKept():
                self._keep(action)
            case Complain(peer, error):
                self.world.note(f"complaint about {peer}: {error}")
            case Ready():
                self.ready = True
            case End(error):
                self.world.ended(self, error)
            case _:
                super().perform(action, lost)

    def _keep(self, action: CopyKept) -> None:
        handle, kept, memory = action.handle, action.kept, self.world.memory
        if not memory.exists(handle.shards[0].segment):
            error = TransferFailed(f"{handle.shards[0].segment} is gone").info()
            self.copy("keep", lambda: KeptCopied(self.now, handle.key, error))
            return
        source = memory.pool(handle.shards[0].segment)
        before = read(source, handle.blocks)

        def end() -> KeptCopied:
            for block, content in zip(kept.blocks, torn(before, read(source, handle.blocks)), strict=True):
                memory.write(kept.shards[0].segment, block, content)
            return KeptCopied(self.now, handle.key)

        self.copy("keep", end)


def gone(key: KvKey) -> ErrorInfo:
    return TransferFailed(f"the KV of {key} can be read no more").info()
