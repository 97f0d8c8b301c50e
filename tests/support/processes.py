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

import dsdecode.events as decode
import dsprefill.events as prefill
from dsdecode.state import DecodeState
from dskv.handle import KvHandle, KvKey
from dsprefill.state import PrefillState
from dsrelay.events import CloseStream, Complain, CopyKept, KeptCopied, OpenStream
from dsrelay.state import RelayState
from dsrouter.events import Tokenize, Tokenized
from dsrouter.state import RouterState
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, Made, Run, RunStep, StartSequence, Stepped
from dswire.errors import ErrorInfo, KvCorrupt, TransferFailed
from dswire.links import End, Ready
from dswire.machine import Machine, PeerLost, Received, Send, Tick
from dswire.messages import kv
from support.handles import LAYOUT
from support.kv_memory import GARBAGE, Block, KvMemory, checksum, in_blocks, read, torn
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
        """Tokenise."""
        if not isinstance(action, Tokenize):
            super().perform(action, lost)
        text = action.submit.prompt or "".join(turn.content for turn in action.submit.chat or ())
        ids = tuple(ord(char) % VOCAB for char in text)
        self.work("tokenize", lambda: Tokenized(self.now, action.submit, ids))


class InstanceProcess(Process):
    """A prefill or decode instance: its steps."""

    machine: InstanceState

    def __init__(self, world: World, name: str, incarnation: str, machine: Machine) -> None:
        super().__init__(world, name, incarnation, machine)
        #: prompt and output of every sequence that takes part in steps
        self.tokens: dict[KvKey, list[int]] = {}
        #: length of the prompt of each
        self._prompts: dict[KvKey, int] = {}
        #: when the last step ends
        self._steps_at = 0.0

    def perform(self, action: Any, lost: list[str]) -> None:
        """Steps."""
        match action:
            case RunStep():
                self._step(action)
            case StartSequence(key, prompt_ids, output_ids):
                assert list(output_ids) == self.world.script.output(key.sequence, len(output_ids))
                self.tokens[key] = [*prompt_ids, *output_ids]
                self._prompts[key] = len(prompt_ids)
            case ForgetSequence(key):
                self.tokens.pop(key, None)
                self._prompts.pop(key, None)
            case Ready():
                self.ready = True
            case End(error):
                self.world.ended(self, error)
            case _:
                super().perform(action, lost)

    def _step(self, step: RunStep) -> None:
        for run in step.runs:
            self._begin(run)
        kind = "prefill" if all(self._reads(run) for run in step.runs) else "step"
        began = self.now
        self._steps_at = max(self._steps_at, self.now + self._about(kind))
        self._later(kind, self._steps_at, lambda: self._stepped(step, began))

    def _begin(self, run: Run) -> None:
        """Check that the step reads and writes what it must, and nothing else."""
        tokens, size = self.tokens[run.key], LAYOUT.block_size
        assert list(run.tokens) == tokens[run.start : run.end]
        assert run.draws == (run.end == len(tokens))
        wanted = in_blocks(tokens[: run.start], size)
        found = read(self.world.memory.pool(self.segment), run.blocks[: len(wanted)])
        assert list(found) == wanted, f"{run.key} would read the wrong KV"
        for block in run.blocks[run.start // size : LAYOUT.blocks_for(run.end)]:
            assert self.machine.pool.holders()[block] == 1, f"{run.key} would write a block of another"
        for block in run.blocks[-(-run.start // size) : LAYOUT.blocks_for(run.end)]:
            self.world.memory.write(self.segment, block, GARBAGE)

    def _stepped(self, step: RunStep, began: float) -> Stepped:
        made: list[Made] = []
        failed: list[tuple[KvKey, ErrorInfo]] = []
        for run in step.runs:
            error = self.world.prefill_errors.pop(run.key.sequence, None) if self._reads(run) else None
            if error is not None:
                failed.append((run.key, error))
            else:
                made.append(Made(run.key, self._run(run)))
        return Stepped(self.now, step.number, tuple(made), self.now - began, tuple(failed))

    def _reads(self, run: Run) -> bool:
        """Whether it is part of a prompt."""
        return run.start < self._prompts[run.key]

    def _run(self, run: Run) -> int | None:
        tokens, first = self.tokens[run.key], run.start // LAYOUT.block_size
        contents = in_blocks(tokens[: run.end], LAYOUT.block_size)[first:]
        for block, content in zip(run.blocks[first:], contents, strict=False):
            self.world.memory.write(self.segment, block, content)
        if not run.draws:
            return None
        token = self.world.script.token(run.key.sequence, len(tokens) - self._prompts[run.key])
        tokens.append(token)
        return token


class PrefillProcess(InstanceProcess):
    """A prefill instance."""

    machine: PrefillState

    def perform(self, action: Any, lost: list[str]) -> None:
        """Copies."""
        match action:
            case prefill.Seal(key, blocks):
                self.copy("seal", lambda: self._sealed(key, blocks))
            case prefill.SendKv(handle, reader, number):
                meeting = f"{self.name}/{self.incarnation}/{reader}"
                self.world.meetings[meeting] = self
                self.copy("meet", lambda: prefill.Sending(self.now, handle.key, number, meeting))
            case prefill.EndSend(reader):
                self.world.meetings.pop(f"{self.name}/{self.incarnation}/{reader}", None)
            case _:
                super().perform(action, lost)

    def _sealed(self, key: KvKey, blocks: tuple[int, ...]) -> prefill.Sealed:
        contents = read(self.world.memory.pool(self.segment), blocks)
        assert GARBAGE not in contents, f"{key} is sealed over blocks that somebody writes"
        return prefill.Sealed(self.now, key, checksum(contents))


class DecodeProcess(InstanceProcess):
    """A decode instance."""

    machine: DecodeState

    def __init__(self, world: World, name: str, incarnation: str, machine: Machine) -> None:
        super().__init__(world, name, incarnation, machine)
        #: under way
        self._streams: dict[KvKey, kv.Ticket] = {}

    def perform(self, action: Any, lost: list[str]) -> None:
        """Copies."""
        match action:
            case decode.CopyDirect(handle, blocks):
                self._copy(handle, blocks, None)
            case decode.CopyStream(handle, blocks, ticket):
                self._streams[handle.key] = ticket
                self._copy(handle, blocks, ticket)
            case decode.CutStream(key) if key not in self._streams:
                # it is about to end by itself
                pass
            case decode.CutStream(key):
                del self._streams[key]
                self.work("cut", lambda: decode.CopyEnded(self.now, key, _gone(key)))
            case _:
                super().perform(action, lost)

    def _copy(self, handle: KvHandle, blocks: tuple[int, ...], ticket: kv.Ticket | None) -> None:
        memory, segment = self.world.memory, handle.shards[0].segment
        if not memory.exists(segment) or not self._open(ticket):
            self._streams.pop(handle.key, None)
            self.copy("copy", lambda: decode.CopyEnded(self.now, handle.key, _gone(handle.key)))
            return
        source = memory.pool(segment)
        before = read(source, handle.blocks)

        def end() -> decode.CopyEnded | None:
            if ticket is not None and self._streams.get(handle.key) != ticket:
                # it was cut
                return None
            self._streams.pop(handle.key, None)
            if not self._open(ticket):
                return decode.CopyEnded(self.now, handle.key, _gone(handle.key))
            self._receive(handle, blocks, torn(before, read(source, handle.blocks)))
            return decode.CopyEnded(self.now, handle.key, self._verify(handle, blocks))

        self.copy("copy", end)

    def _open(self, ticket: kv.Ticket | None) -> bool:
        """Whether a stream or a meeting, if there is one, goes on."""
        if ticket is None:
            return True
        other = self.world.meetings.get(ticket.meeting) or self.world.tickets.get(ticket.token)
        return other is not None and other.alive

    def _receive(self, handle: KvHandle, blocks: tuple[int, ...], contents: tuple[Block, ...]) -> None:
        for block, content in zip(blocks, contents, strict=False):
            self.world.memory.write(self.segment, block, content)

    def _verify(self, handle: KvHandle, blocks: tuple[int, ...]) -> ErrorInfo | None:
        contents = read(self.world.memory.pool(self.segment), blocks[: len(handle.blocks)])
        if checksum(contents) == handle.checksum:
            return None
        self.world.note(f"corrupt {handle.key}")
        return KvCorrupt(f"{handle.key} is not what was sealed").info()


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


def _gone(key: KvKey) -> ErrorInfo:
    return TransferFailed(f"the KV of {key} can be read no more").info()
