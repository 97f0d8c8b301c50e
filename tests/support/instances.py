"""Prefill and decode instances as modelled processes: steps one at a time, copies one after the other.

They watch what machines cannot see: that every step and every copy reads the KV that it must.
"""

from __future__ import annotations

from typing import Any

import dsdecode.events as decode
import dsprefill.events as prefill
from dsdecode.state import DecodeState
from dskv.handle import KvHandle, KvKey
from dsprefill.state import PrefillState
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, Made, Run, RunStep, StartSequence, Stepped
from dswire.errors import ErrorInfo, KvCorrupt
from dswire.links import End, Ready
from dswire.machine import Machine
from dswire.messages import kv
from support.handles import LAYOUT
from support.kv_memory import GARBAGE, Block, checksum, in_blocks, read, torn
from support.processes import Process, World, gone


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
                self.work("cut", lambda: decode.CopyEnded(self.now, key, gone(key)))
            case _:
                super().perform(action, lost)

    def _copy(self, handle: KvHandle, blocks: tuple[int, ...], ticket: kv.Ticket | None) -> None:
        memory, segment = self.world.memory, handle.shards[0].segment
        if not memory.exists(segment) or not self._open(ticket):
            self._streams.pop(handle.key, None)
            self.copy("copy", lambda: decode.CopyEnded(self.now, handle.key, gone(handle.key)))
            return
        source = memory.pool(segment)
        before = read(source, handle.blocks)

        def end() -> decode.CopyEnded | None:
            if ticket is not None and self._streams.get(handle.key) != ticket:
                # it was cut
                return None
            self._streams.pop(handle.key, None)
            if not self._open(ticket):
                return decode.CopyEnded(self.now, handle.key, gone(handle.key))
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
