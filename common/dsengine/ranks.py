"""The engine of an instance of several ranks: one of them itself, the others its child processes, or those of rank
hosts on other nodes.

The process of the instance is the rank that draws (:func:`~dsengine.parallel.drawing_rank`). A step is told to all
others as soon as it is launched and ended in order, so that as many steps as there are stages can be under way.

Invariants: no rank outlives this process, nor does the file of its pool; when one is gone or frozen, or a step
failed half-way, the ranks are of no use any more: ``on_lost`` is called, once, and every later step raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import TypeVar

import torch
from torch import Tensor

from dsengine.config import EngineConfig
from dsengine.parallel import Part, drawing_rank
from dsengine.rank_group import GroupPeers
from dsengine.rank_hosts import RankHosts
from dsengine.rank_orders import (
    LOAD_S,
    RankCopy,
    RankMeet,
    RankStep,
    Report,
    StageOrder,
    Start,
    encode,
)
from dsengine.rank_process import END_S, RankProcess
from dsengine.rendezvous import Rendezvous
from dsengine.runner import Engine, StepItem, device_of
from dsengine.span import Span
from dsengine.wire import PeerGone, Wires
from dswire.errors import DsError, EngineFailed, StartFailed, from_info
from dswire.messages.ranks import MirrorWay

T = TypeVar("T")

#: longest wait, in seconds, for the end of a copy
COPY_S = 60.0


class _Other:
    """What another rank reports."""

    def __init__(self, name: str, rank: int, on_end: Callable[[DsError], None]) -> None:
        self._who = f"rank {rank} of {name}"
        self._on_end = on_end
        self._reports: SimpleQueue[Report] = SimpleQueue()

    def take(self, report: Report) -> None:
        """It says something; in any thread."""
        self._reports.put(report)
        if report.state == "failed":
            assert report.error is not None
            self._on_end(from_info(report.error))

    def wait_for(self, state: str) -> Report:
        """Wait until it reports ``state``. Raises why it never will."""
        try:
            report = self._reports.get(timeout=LOAD_S)
        except Empty:
            raise StartFailed(f"{self._who} has not loaded its part of the model within {LOAD_S:g} s") from None
        if report.error is not None:
            raise from_info(report.error)
        assert report.state == state
        return report

    def copied(self) -> Report:
        """Wait for the end of a copy; ``failed`` where there will be none, now and ever after."""
        try:
            report = self._reports.get(timeout=COPY_S)
        except Empty:
            told = f"{self._who} has not copied its part of the KV within {COPY_S:g} s"
            report = Report("failed", EngineFailed(told).info())
        if report.state == "failed":
            self._reports.put(report)
        return report


class RankedEngine(Engine):
    """``tp * pp`` ranks that are one replica of a model."""

    def __init__(
        self,
        name: str,
        configs: Sequence[EngineConfig],
        tp: int,
        pp: int,
        rendezvous: Rendezvous,
        hosts: RankHosts | None = None,
    ) -> None:
        """Start the others and load; ``configs`` go by rank and differ in device and segment.

        ``hosts`` run the ranks of other nodes. Raises what :class:`Engine` raises, here or in another rank, and
        :class:`StartFailed`.
        """
        own = drawing_rank(tp, pp)
        self._lock = Lock()
        #: one copy at a time, so that all know which one a report is about
        self._copying = Lock()
        self._gone = Event()
        self._lost: DsError | None = None
        self._closed = False
        self._on_lost: Callable[[DsError], object] | None = None
        # one that tells in order, so that nobody has to wait while a pipe is full
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="tell")
        self._hosts = hosts
        self._children: dict[int, RankProcess] = {}
        self._others = {rank: _Other(name, rank, self._lose) for rank in range(tp * pp) if rank != own}
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as met:
            undo.callback(self._end)
            met.callback(rendezvous.clear)
            meeting = rendezvous.new()
            wiring = None if hosts is None else hosts.wiring
            if hosts is not None:
                hosts.begin({rank: self._others[rank].take for rank in hosts.ranks})
            for rank, other in self._others.items():
                if hosts is None or rank not in hosts.ranks:
                    start = Start(name, tp, pp, rank, str(meeting), configs[rank], wiring=wiring)
                    self._children[rank] = RankProcess(start, other.take)
            part, device = Part(tp, pp, own), device_of(configs[own].device)
            try:
                wires = None if wiring is None else Wires(part, wiring)
                self._join(part, wires)
                torch.set_num_threads(configs[own].threads)
                self._peers = GroupPeers(part, device, meeting, wires)
            except PeerGone as error:
                remedy = "see what the ranks log, and that nothing keeps them from talking to each other"
                raise StartFailed(str(error), remedy=remedy) from error
            undo.callback(self._peers.close)
            super().__init__(configs[own], part, self._peers)
            undo.callback(super().close)
            for other in self._others.values():
                other.wait_for("ready")
            undo.pop_all()

    @property
    def lost(self) -> DsError | None:
        """Why the ranks are of no use any more."""
        return self._lost

    def watch(self, on_lost: Callable[[DsError], object]) -> None:
        """Call ``on_lost``, in a thread of its own, when the ranks are of no use any more."""
        with self._lock:
            self._on_lost = on_lost
            error = self._lost
        if error is not None:
            on_lost(error)

    def forward(self, spans: Sequence[Span], picked: Sequence[int]) -> Tensor | None:
        """As :meth:`Engine.forward`; whatever goes wrong, the ranks are then lost to each other."""
        if self._lost is not None:
            raise self._lost
        try:
            return super().forward(spans, picked)
        except DsError as error:
            self._lose(error)
            raise
        except PeerGone as error:
            # the end of its process tells more
            self._gone.wait(END_S)
            self._lose(EngineFailed(str(error)))
            assert self._lost is not None
            raise self._lost from error

    def mirror(self, blocks: Sequence[int], way: MirrorWay) -> None:
        """As :meth:`Engine.mirror`, at all ranks.

        What a step has written before its end here is in the pools of the others, too: this rank needed what they
        made of it.
        """
        with self._copying:
            copy = RankCopy(tuple(blocks), way)
            self._tell_all(encode(copy))
            if self._hosts is not None:
                self._teller.submit(self._hosts.copy, copy)
            self._done(list(self._others), lambda: super(RankedEngine, self).mirror(blocks, way))

    def beside(
        self, order: StageOrder, ranks: Sequence[int], meanwhile: Callable[[], T]
    ) -> tuple[T, dict[int, int]]:
        """Have ``ranks`` of other nodes do something with KV beside the steps, and do ``meanwhile``.

        What that returns, and the checksum of each rank. Raises what went wrong, once all are done.
        """
        assert self._hosts is not None
        with self._copying:
            if self._lost is not None:
                raise self._lost
            for rank in ranks:
                self._teller.submit(self._hosts.beside, rank, order)
            return self._done(ranks, meanwhile)

    def _done(self, ranks: Sequence[int], meanwhile: Callable[[], T]) -> tuple[T, dict[int, int]]:
        """The end of what ``ranks`` were told; nobody may be told more before."""
        failed: list[DsError] = []
        made: list[T] = []
        try:
            made.append(meanwhile())
        except DsError as error:
            failed.append(error)
        reports = {rank: self._others[rank].copied() for rank in ranks}
        for report in reports.values():
            if report.error is not None:
                failed.append(from_info(report.error))
                if report.state == "failed":
                    self._lose(failed[-1])
        if failed:
            raise self._lost or failed[0]
        return made[0], {rank: report.checksum for rank, report in reports.items()}

    def abandon(self) -> None:
        """Kill the other ranks and remove the files of all pools. Never blocks: for a process about to end."""
        for child in self._children.values():
            child.kill()
        super().abandon()

    def close(self) -> None:
        """End the other ranks, and give the memory back; not within a step. Doing it twice is harmless."""
        if not self._closed:
            self._end()
            self._peers.close()
        super().close()

    def _tell(self, batch: Sequence[StepItem], picked: Sequence[int]) -> None:
        step = RankStep.of(batch, picked)
        self._tell_all(encode(step))
        if self._hosts is not None:
            self._teller.submit(self._hosts.step, step)

    def _tell_all(self, frame: bytes) -> None:
        if self._lost is not None:
            raise self._lost
        for child in self._children.values():
            self._teller.submit(child.tell, frame)

    def _join(self, part: Part, wires: Wires | None) -> None:
        """Wait until all others are about to look for each other; tell them where to, if they cannot know."""
        found = {rank: other.wait_for("joining").where for rank, other in self._others.items()}
        if wires is None:
            return
        found[part.rank] = wires.where
        for rank in self._others:
            meet = RankMeet(found.get(rank + part.tp, ""))
            if rank in self._children:
                self._children[rank].tell(encode(meet))
            elif self._hosts is not None:
                self._hosts.meet(rank, meet)
        wires.meet("")

    def _lose(self, error: DsError) -> None:
        with self._lock:
            if self._lost is not None or self._closed:
                return
            self._lost = error
            on_lost = self._on_lost
        self._gone.set()
        if on_lost is not None:
            on_lost(error)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
        self._teller.shutdown(wait=False, cancel_futures=True)
        for child in self._children.values():
            child.end()
