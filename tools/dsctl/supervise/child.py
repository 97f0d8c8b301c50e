"""One operating-system process of a run: made, listened to, signalled, and reaped.

Invariants: the process leads a session and process group of its own; when it has ended, everything left of its
group is killed before ``on_exit`` is called, so a restart never meets the one before; everything that it reported
is delivered before ``on_exit``. Its end is noticed through a pidfd, so nothing polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: a log that is larger when its process is started again is set aside
LOG_LIMIT_NBYTES = 64 << 20
#: a report line that is longer is dropped
REPORT_LIMIT_NBYTES = 64 << 10
#: how much of a log's end is looked at for last words, and so their longest length
WORDS_NBYTES = 1000


class Child:
    """A running process. Raises ``OSError`` from the constructor when it cannot be made."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        lifeline: int,
        on_report: Callable[[bytes], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """``lifeline``: read end of the pipe whose write end only the supervisor has."""
        self._on_report = on_report
        self._on_exit = on_exit
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        self._report, report_end = os.pipe()
        try:
            self._popen = _popen(command, env, log, lifeline, report_end)
        except OSError:
            os.close(self._report)
            raise
        finally:
            os.close(report_end)
        os.set_blocking(self._report, False)
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._loop.add_reader(self._report, self._read)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Also the number of its process group."""
        return self._popen.pid

    def terminate(self) -> None:
        """SIGTERM to the process; what it started it ends itself."""
        self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill_and_reap(self) -> None:
        """The end of a supervisor that itself fails: kill, wait, and call nobody."""
        self.kill()
        self._close()

    def _reap(self) -> None:
        # not yet waited for: its pid, and so its group's number, cannot have been used again
        self.kill()
        self._read()
        self._on_exit(self._close())

    def _close(self) -> int:
        """Reap it and close everything; returns the exit status, or minus the signal's number."""
        for descriptor in (self._report, self._pidfd):
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._popen.wait()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._report, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(self._report)
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._buffer = self._buffer[:REPORT_LIMIT_NBYTES]
            for line in lines:
                self._on_report(line)


def _popen(
    command: Sequence[str], env: Mapping[str, str], log: Path, lifeline: int, report: int
) -> subprocess.Popen[bytes]:
    if log.exists() and log.stat().st_size > LOG_LIMIT_NBYTES:
        log.replace(log.with_suffix(".log.1"))
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lifeline, report),
            env={**env, "DS_LIFELINE_FD": str(lifeline), "DS_REPORT_FD": str(report)},
        )


def last_words(log: Path) -> str:
    """The last line of a log unless it is one of ours: what Python or a library said as the process died."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - WORDS_NBYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "" if last.startswith("{") else last.strip()
