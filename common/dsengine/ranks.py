"""The engine of an instance of several ranks: one of them itself, the others its child processes.

The process of the instance is the rank that draws (:func:`~dsengine.parallel.drawing_rank`). A step is told to all
others as soon as it is launched and ended in order, so that as many steps as there are stages can be under way.

Invariants: no child outlives this process (each ends with its standard input), nor does the file of its pool; when
one is gone or frozen, or a step failed half-way, the ranks are of no use any more: ``on_lost`` is called, once, and
every later step raises.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader, RawIOBase
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

import msgspec
import torch
from torch import Tensor

from dsengine.config import EngineConfig
from dsengine.mirror import MirrorWay
from dsengine.parallel import Part, drawing_rank
from dsengine.rank_group import GroupPeers, PeerGone
from dsengine.rank_orders import RankCopy, RankSpan, RankStep, Report, Start, encode, read
from dsengine.runner import Engine, StepItem, device_of
from dsengine.span import Span
from dswire.errors import DsError, EngineFailed, StartFailed, from_info

#: longest wait, in seconds, for a child to have loaded its part of the model, and for one to end
LOAD_S = 600.0
END_S = 5.0
#: and for the end of a copy between a pool and its mirror
COPY_S = 60.0
#: a rank that has loaded and gives no sign of life for so many seconds, twice in a row, is taken for frozen
SILENCE_S = 6.0


class _Child:
    """The process of one rank."""

    def __init__(self, start: Start, on_end: Callable[[DsError], None]) -> None:
        self._segment = start.config.segment
        self._who = f"rank {start.rank} of {start.name}"
        self._on_end = on_end
        self._reports: SimpleQueue[Report] = SimpleQueue()
        #: it has made the file of its pool
        self._ready = False
        self._process = subprocess.Popen(
            # its name is for those who list processes
            [sys.executable, "-m", "dsengine.rank", f"{start.name}.{start.rank}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        Thread(target=self._listen, name=self._who, daemon=True).start()
        self.tell(encode(start))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, frame: bytes) -> None:
        """Waits while the pipe is full; what is told to one that is gone is lost."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(frame)
            self._process.stdin.flush()

    def wait_for(self, state: str) -> None:
        """Wait until it reports ``state``. Raises why it never will."""
        try:
            report = self._reports.get(timeout=LOAD_S)
        except Empty:
            raise StartFailed(f"{self._who} has not loaded its part of the model within {LOAD_S:g} s") from None
        if report.error is not None:
            raise from_info(report.error)
        assert report.state == state
        self._ready = state == "ready"

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

    def end(self) -> None:
        """Let it end in good order, else make it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._unlink()

    def kill(self) -> None:
        """End it now; its end is waited for by nobody."""
        self._process.kill()
        self._unlink()

    def _unlink(self) -> None:
        """Remove the file of its pool, which one that was killed leaves behind."""
        if self._segment is not None and self._ready:
            self._segment.unlink(missing_ok=True)

    def _listen(self) -> None:
        assert isinstance(self._process.stdout, BufferedReader)
        # unbuffered: nothing that came may hide from select()
        stream = self._process.stdout.raw
        loaded, report = False, None
        while True:
            if loaded and self._silent(stream):
                self._reports.put(report := self._frozen())
                break
            if (frame := read(stream)) is None:
                break
            report = msgspec.msgpack.decode(frame, type=Report)
            loaded = loaded or report.state == "ready"
            if report.state != "alive":
                self._reports.put(report)
        self._process.stdout.close()
        if report is None or report.state != "failed":
            told = f"{self._who} has ended: {_described(self._process.wait())}"
            error = EngineFailed(told, remedy="`dsctl logs` tells more; a supervisor starts the instance again")
            report = Report("failed", error.info())
            self._reports.put(report)
        assert report.error is not None
        self._on_end(from_info(report.error))

    def _silent(self, stream: RawIOBase) -> bool:
        """Whether nothing comes, not even a sign of life."""
        # Twice: where this process or the whole machine was stopped, the first wait may be over before the rank
        # has run again. What came meanwhile counts, for the system looks for it before it looks at the clock.
        return not any(select.select([stream], [], [], SILENCE_S)[0] for _ in range(2))

    def _frozen(self) -> Report:
        """It cannot be told to end, and others wait for it within a step: end it, which ends their wait."""
        self._process.kill()
        told = f"{self._who} is frozen: it gave no sign of life for {2 * SILENCE_S:g} s, and was killed"
        remedy = "see what stopped process {pid}; a supervisor starts the instance again"
        return Report("failed", EngineFailed(told, remedy=remedy.format(pid=self.pid)).info())


class RankedEngine(Engine):
    """``tp * pp`` ranks that are one replica of a model."""

    def __init__(self, name: str, configs: Sequence[EngineConfig], tp: int, pp: int) -> None:
        """Start the others and load; ``configs`` go by rank and differ in device and segment.

        Raises what :class:`Engine` raises, here or in another rank, and :class:`StartFailed`.
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
        self._children: list[_Child] = []
        with contextlib.ExitStack() as undo, tempfile.TemporaryDirectory(prefix="ds-ranks-") as directory:
            undo.callback(self._end)
            meeting = Path(directory) / "rendezvous"
            for rank, config in enumerate(configs):
                if rank != own:
                    self._children.append(_Child(Start(name, tp, pp, rank, str(meeting), config), self._lose))
            part, device = Part(tp, pp, own), device_of(configs[own].device)
            self._wait_for("joining")
            torch.set_num_threads(configs[own].threads)
            try:
                self._peers = GroupPeers(part, device, meeting)
            except PeerGone as error:
                remedy = "see what the ranks log, and that nothing keeps processes of this host from talking"
                raise StartFailed(str(error), remedy=remedy) from error
            undo.callback(self._peers.close)
            super().__init__(configs[own], part, self._peers)
            undo.callback(super().close)
            self._wait_for("ready")
            undo.pop_all()

    @property
    def pids(self) -> list[int]:
        """The other ranks' processes."""
        return [child.pid for child in self._children]

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
            self._tell_all(encode(RankCopy(list(blocks), way)))
            failed: list[DsError] = []
            try:
                super().mirror(blocks, way)
            except DsError as error:
                failed.append(error)
            for report in [child.copied() for child in self._children]:
                if report.error is not None:
                    failed.append(from_info(report.error))
                    if report.state == "failed":
                        self._lose(failed[-1])
            if failed:
                raise self._lost or failed[0]

    def abandon(self) -> None:
        """Kill the other ranks and remove the files of all pools. Never blocks: for a process about to end."""
        for child in self._children:
            child.kill()
        super().abandon()

    def close(self) -> None:
        """End the other ranks, and give the memory back; not within a step. Doing it twice is harmless."""
        if not self._closed:
            self._end()
            self._peers.close()
        super().close()

    def _tell(self, batch: Sequence[StepItem], picked: Sequence[int]) -> None:
        self._tell_all(encode(RankStep([RankSpan.of(item) for item in batch], list(picked))))

    def _tell_all(self, frame: bytes) -> None:
        if self._lost is not None:
            raise self._lost
        for child in self._children:
            self._teller.submit(child.tell, frame)

    def _wait_for(self, state: str) -> None:
        for child in self._children:
            child.wait_for(state)

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
        for child in self._children:
            child.end()


def _described(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
