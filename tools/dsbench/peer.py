"""The worker process of one system, seen from the command.

Every request has a deadline; a worker that dies, hangs or answers nonsense gives a :class:`PeerFailed` with the end
of what it printed. It is stopped (SIGSTOP) whenever it has nothing to answer: threads of OpenMP spin for a while
after their work, on the cores of whoever has the next turn.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbench.points import Loaded, Point
from dswire.errors import DsError

#: loading, compiling included
LOAD_S = 600.0
#: one request
STEP_S = 600.0
_WORKER = Path(__file__).parent / "worker.py"


class PeerFailed(DsError):
    """A measured system did not answer as it should."""

    code = "bench_peer"


class Peer:
    """A running worker."""

    def __init__(self, system: str, python: str, model: Path, dtype: str, threads: int, max_len: int) -> None:
        """Start it and wait until it has loaded. Raises :class:`PeerFailed`."""
        self.system = system
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        command = [python, str(_WORKER), "--system", system, "--model", str(model), "--dtype", dtype]
        command += ["--threads", str(threads), "--max-len", str(max_len)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        self._buffer = b""
        #: of what was measured last, the seconds inside kernels; None where that is not known
        self.kernel_s: float | None = None
        try:
            self.loaded = Loaded(**self._answer(LOAD_S))
        except BaseException:
            # an interrupt too must leave no process behind
            self.close()
            raise

    def prepare(
        self, phase: str, batch: int = 0, context: int = 0, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        """Make the next measurements be of this. Raises :class:`PeerFailed`."""
        self._ask({"prepare": [phase, batch, context, temperature, top_p]})

    def prepare_point(self, point: Point) -> None:
        """The same for ``point``."""
        self.prepare(point.phase, point.batch, point.context, point.temperature, point.top_p)

    def measure(self, for_s: float) -> list[float]:
        """Seconds of each step, for about ``for_s`` seconds and at least one. Raises :class:`PeerFailed`."""
        answer = self._ask({"for_s": for_s})
        self.kernel_s = answer["kernel_s"]
        seconds: list[float] = answer["seconds"]
        return seconds

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def close(self) -> None:
        """End the process. Doing it twice is harmless."""
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is not None:
            # a request that a dead worker never took cannot be flushed
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            self._process.send_signal(signal.SIGCONT)
        except OSError as error:
            raise PeerFailed(f"{self.system} has ended: {self._said()}") from error
        return self._answer(STEP_S)

    def _answer(self, wait_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + wait_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                what = "has ended" if ready else f"did not answer within {wait_s:.0f} s"
                raise PeerFailed(f"{self.system} {what}: {self._said()}")
            self._buffer += piece
        self._process.send_signal(signal.SIGSTOP)
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.system}: {answer['error']}")
        return answer

    def _said(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 400))
        return self._log.read().decode(errors="replace").strip() or "it printed nothing"
