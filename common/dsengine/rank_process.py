"""The process of a rank, as the child of the instance's process or, on another node, of a rank host.

Invariants: it ends with its standard input, so it never outlives its parent; the file of its pool goes with it. The
last of its reports is ``failed``, whatever becomes of it, and one that is frozen is killed.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BufferedReader, RawIOBase
from threading import Thread

import msgspec

from dsengine.rank_orders import Report, Start, encode, read
from dswire.errors import EngineFailed

#: longest wait, in seconds, for it to end
END_S = 5.0
#: a rank that has loaded and gives no sign of life for so many seconds, twice in a row, is taken for frozen
SILENCE_S = 6.0


class RankProcess:
    """One of them."""

    def __init__(self, start: Start, on_report: Callable[[Report], None]) -> None:
        """``on_report`` is called in a thread of its own, for all but signs of life."""
        self._segment = start.config.segment
        self._who = f"rank {start.rank} of {start.name}"
        self._on_report = on_report
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
        report = None
        while True:
            if self._ready and self._silent(stream):
                self._on_report(report := self._frozen())
                break
            if (frame := read(stream)) is None:
                break
            report = msgspec.msgpack.decode(frame, type=Report)
            self._ready = self._ready or report.state == "ready"
            if report.state != "alive":
                self._on_report(report)
        self._process.stdout.close()
        if report is None or report.state != "failed":
            told = f"{self._who} has ended: {_described(self._process.wait())}"
            error = EngineFailed(told, remedy="`dsctl logs` tells more; a supervisor starts the instance again")
            self._on_report(Report("failed", error.info()))

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


def _described(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
