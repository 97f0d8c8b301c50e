"""Shells around the services' machines: what ``actor.py`` does with sockets, threads and a clock, in virtual time.

Each performs its machine's actions and nothing else; no decision is taken here. As in the real shells an instance
runs one step at a time on each of its stages, and its copies one after the other in the order in which they were
asked for, beside the steps. Connections lose nothing and keep the order of what is sent, until one of their ends
dies: what was sent to the end that opened it is lost then, and whoever sends more is told; the other end finds what
it was sent unread when it is back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

import dsprefill.events as prefill
from dsrelay.events import CloseStream, Complain, CopyKept, KeptCopied, OpenStream
from dsrouter.events import Note
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, Made, RunStep, StartSequence, Stepped
from dssim.kernel import Kernel
from dssim.pipeline import Pipeline
from dssim.times import Chunk, StepTimes, TransferTimes
from dswire.errors import ErrorInfo, from_info
from dswire.links import End, Ready
from dswire.machine import Machine, PeerLost, Received, Send, Tick
from dswire.messages.kv import KvFetchGranted, Ticket
from dswire.messages.worker import Load, Preempted, StepDone, WorkerReport

#: every token, of prompts and answers
TOKEN = 1
#: what the token of a ticket holds here: when the stream ends, in seconds
ENDS = struct.Struct("<d")


class Step(msgspec.Struct, frozen=True):
    """One step that an instance ran, for timelines and traces."""

    instance: str
    began_s: float
    #: that it held each stage
    seconds: float
    sequences: int
    #: of prompts the tokens read, of sequences that decode the tokens of context
    tokens: int


class Receiver(Protocol):
    """The end of a connection."""

    name: str
    alive: bool

    def arrive(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come."""


@dataclass(frozen=True, slots=True)
class Way:
    """A connection, as one of its ends has it."""

    other: Receiver
    #: the other's name for us
    us: str
    #: how long messages take
    seconds: float
    #: whether we opened it; if so it outlives the other
    ours: bool


class Watch(Protocol):
    """Who wants to know what happens inside."""

    def step(self, step: Step) -> None:
        """A step begins."""

    def load(self, now: float, name: str, load: Load) -> None:
        """A worker tells its load, once a second."""

    def preempted(self) -> None:
        """A decode instance had no room for a sequence that ran."""


class Process:
    """One process with its machine."""

    def __init__(self, name: str, node: str, machine: Machine, kernel: Kernel, transfers: TransferTimes) -> None:
        self.name = name
        self.node = node
        self.machine = machine
        self.ready = False
        self.alive = True
        #: what came after its death
        self.unread: list[tuple[str, msgspec.Struct]] = []
        #: called after every event
        self.check: Callable[[], None] | None = None
        self.kernel = kernel
        self.transfers = transfers
        #: by the machine's name for a peer
        self.peers: dict[str, Way] = {}
        self._copies_end = 0.0
        #: when the tick that is scheduled comes
        self._tick_at: float | None = None

    def start(self) -> None:
        """The process comes up, and says hello to those it knows."""
        self.feed(Tick(self.kernel.now))

    def arrive(self, peer: str, message: msgspec.Struct) -> None:
        """A message has come, perhaps to nobody."""
        if self.alive:
            self.feed(Received(self.kernel.now, peer, message))
        else:
            self.unread.append((peer, message))

    def feed(self, event: Any) -> None:
        """Give the machine an event and perform what it wants, unless the process is dead."""
        if not self.alive:
            return
        for action in self.machine.handle(event):
            if type(action) is Send:
                self.send(action.peer, action.message)
            else:
                self.perform(action)
        if self.check is not None:
            self.check()
        deadline = self.machine.next_deadline()
        # a tick that comes too early looks again; one that comes too late would be wrong
        if deadline is not None and (self._tick_at is None or deadline < self._tick_at):
            self._tick_at = deadline
            self.kernel.at(deadline, self._tick, deadline)

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message."""
        way = self.peers[peer]
        if not (way.ours or way.other.alive):
            self.kernel.after(0.0, self.feed, PeerLost(self.kernel.now, peer))
            return
        self.kernel.after(way.seconds, way.other.arrive, way.us, message)

    def perform(self, action: Any) -> None:
        """Perform an action of the service."""
        raise TypeError(f"{self.name} cannot perform {action!r}")

    def refused(self, error: ErrorInfo) -> None:
        """The machine ends: in a simulation nothing can make it do so but a wrong set-up."""
        raise from_info(error)

    def settle(self) -> None:
        """Bring the machine up to now, where it was left behind."""

    def copy(self, seconds: float, end: Callable[[float], Any]) -> None:
        """Do a piece of work after the copies asked for before; then feed the event that ``end`` makes."""
        self._copies_end = max(self.kernel.now, self._copies_end) + seconds
        self.kernel.at(self._copies_end, lambda: self.feed(end(self.kernel.now)))

    def _tick(self, deadline: float) -> None:
        if self._tick_at != deadline:
            return
        self._tick_at = None
        wanted = self.machine.next_deadline()
        if wanted is None:
            return
        if wanted <= self.kernel.now:
            self.feed(Tick(self.kernel.now))
        else:
            self._tick_at = wanted
            self.kernel.at(wanted, self._tick, wanted)


class Listener(Protocol):
    """A client, that only listens to what it is told of its requests."""

    def heard(self, now: float, message: msgspec.Struct) -> None:
        """A message reaches it at ``now``, which lies ahead; they come in order."""


class RouterProcess(Process):
    """The router; prompts come as tokens, so there is nothing to tokenise."""

    #: by the machine's name, with seconds on the way
    clients: dict[str, tuple[Listener, float]]

    def __init__(self, name: str, node: str, machine: Machine, kernel: Kernel, transfers: TransferTimes) -> None:
        super().__init__(name, node, machine, kernel, transfers)
        self.clients = {}
        #: what the machine would know by now, had it been told at once: told before it looks at anything else
        self.untold: dict[str, Callable[[], None]] = {}

    def feed(self, event: Any) -> None:
        """Give the machine an event, and before it what it was not told yet."""
        while self.untold:
            self.untold.popitem()[1]()
        super().feed(event)

    def perform(self, action: Any) -> None:
        """Nobody reads a log here."""
        if not isinstance(action, Note):
            super().perform(action)

    def count(self, peer: str, message: StepDone, came_at: float) -> None:
        """Tokens have come that end nothing: the machine only counts them, and looks at nothing else."""
        super().feed(Received(came_at, peer, message))

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message; a client is told at once, since what it hears changes nothing here."""
        known = self.clients.get(peer)
        if known is None:
            super().send(peer, message)
        else:
            known[0].heard(self.kernel.now + known[1], message)


class Worker(Process):
    """An instance: a machine, and a model of the device under it."""

    def __init__(
        self,
        name: str,
        node: str,
        machine: InstanceState,
        kernel: Kernel,
        transfers: TransferTimes,
        *,
        times: StepTimes,
        watch: Watch,
    ) -> None:
        super().__init__(name, node, machine, kernel, transfers)
        self.times = times
        self.watch = watch
        self.pipeline = Pipeline(machine.config.stages)

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message; the load that is told every second is noted on the way."""
        if type(message) is WorkerReport:
            self.watch.load(self.kernel.now, self.name, message.load)
        elif type(message) is Preempted:
            self.watch.preempted()
        super().send(peer, message)

    def perform(self, action: Any) -> None:
        """Steps."""
        match action:
            case RunStep():
                self._step(action)
            case StartSequence() | ForgetSequence():
                pass
            case Ready():
                self.ready = True
            case End(error):
                self.refused(error)
            case _:
                super().perform(action)

    def _step(self, step: RunStep) -> None:
        now = self.kernel.now
        contexts = [run.start + 1 for run in step.runs if run.start > 0 and len(run.tokens) == 1]
        chunks: list[Chunk] = []
        if len(contexts) < len(step.runs):
            chunks = [(run.start, run.end) for run in step.runs if len(run.tokens) > 1 or run.start == 0]
        leaves = self.work(chunks, contexts)
        self.kernel.at(leaves, self._stepped, step, leaves - now)

    def work(self, chunks: Sequence[Chunk], contexts: Sequence[int]) -> float:
        """Begin a step; when it will end."""
        whole_s = self._whole_s(chunks, contexts)
        enters, leaves = self.pipeline.step(self.kernel.now, whole_s)
        tokens = sum(end - start for start, end in chunks) + sum(contexts)
        stage_s = whole_s / self.pipeline.stages
        self.watch.step(Step(self.name, enters, stage_s, len(chunks) + len(contexts), tokens))
        return leaves

    def _whole_s(self, chunks: Sequence[Chunk], contexts: Sequence[int]) -> float:
        if not chunks and self.pipeline.stages == 1:
            return self.times.decode_s(contexts)
        if contexts or any(start for start, _ in chunks):
            return self.times.mixed_s(chunks, contexts)
        return self.times.prefill_s([end for _, end in chunks])

    def _stepped(self, step: RunStep, seconds: float) -> None:
        made = tuple([Made(run.key, TOKEN if run.draws else None) for run in step.runs])
        self.feed(Stepped(self.kernel.now, step.number, made, seconds))


class PrefillProcess(Worker):
    """A prefill instance."""

    def perform(self, action: Any) -> None:
        """Copies."""
        match action:
            case prefill.Seal(key, blocks):
                nbytes = len(blocks) * self._block_nbytes
                self.copy(self.transfers.seal_s(nbytes), lambda now: prefill.Sealed(now, key, 0))
            case _:
                super().perform(action)

    @property
    def _block_nbytes(self) -> int:
        nbytes: int = self.machine.config.capacity.layout.block_nbytes  # type: ignore[attr-defined]
        return nbytes


class RelayProcess(Process):
    """The relay of a node, what it keeps, and the node's link to the others."""

    _link_free_s = 0.0

    def perform(self, action: Any) -> None:
        """Streams leave one after the other; a ticket tells when its bytes will have come."""
        match action:
            case OpenStream(peer, handle, number):
                self._link_free_s = max(self.kernel.now, self._link_free_s) + self.transfers.network_s(
                    handle.nbytes
                )
                self.send(peer, KvFetchGranted(handle.key, Ticket(ENDS.pack(self._link_free_s)), number))
            case CloseStream():
                pass
            case CopyKept(handle, _):
                seconds = self.transfers.copy_s(handle.nbytes)
                self.copy(seconds, lambda now: KeptCopied(now, handle.key))
            case Complain(_, error):
                raise error
            case Ready():
                self.ready = True
            case End(error):
                self.refused(error)
            case _:
                super().perform(action)
