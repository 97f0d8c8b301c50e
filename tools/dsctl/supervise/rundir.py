"""The directory of a run: lock, state file, logs.

    <run_dir>/supervisor.lock   held (flock) by the supervisor as long as it lives; tells its pid and topology
    <run_dir>/state.json        the RunRecord, replaced atomically; there while the supervisor lives
    <run_dir>/logs/NAME.log     output of each process; NAME.log.1 is that of the run before
    <run_dir>/NAME.ready        see dswire.process
    <run_dir>/NAME.ranks.*      by which ranks meet: see dsengine.rendezvous
    <run_dir>/*.sock            Unix sockets

Invariants: at most one supervisor holds the lock; the kernel frees it with its holder, however that died. The lock
file itself is never removed, so that it also tells which topology the logs of a finished run belong to.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dsctl.supervise.record import RunRecord, start_ticks
from dswire.errors import Failed, Refused

LOCK = "supervisor.lock"
STATE = "state.json"
LOGS = "logs"

#: other commands look at the lock by taking it for an instant
_LOCK_TRIES = 10
_LOCK_PAUSE_S = 0.02


class Holder(msgspec.Struct, frozen=True):
    """Who holds, or last held, the lock."""

    pid: int
    #: with ``pid`` names the process beyond doubt: pids are used again
    start_ticks: int | None
    #: absolute path of its topology file
    topology: str


class RunDir:
    """Paths, lock and state file of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / LOGS
        self._lock = path / LOCK
        self._state = path / STATE

    def log_of(self, name: str) -> Path:
        """The log file of a process, or of the ``supervisor``."""
        return self.logs / f"{name}.log"

    def last_holder(self) -> Holder | None:
        """Who holds the lock or held it last; None when nobody ever did."""
        try:
            return msgspec.json.decode(self._lock.read_bytes(), type=Holder)
        except (OSError, msgspec.DecodeError):
            return None

    def holder(self) -> Holder | None:
        """The supervisor that holds the lock now."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.last_holder()
        finally:
            os.close(descriptor)
        return None

    def mtime(self) -> float:
        """When the last supervisor began, in seconds since 1970."""
        return self._lock.stat().st_mtime

    def make(self) -> None:
        """Make the directory. Raises :class:`Refused` when it, or its parent in /tmp, is another user's."""
        try:
            # mkdir gives its mode to the last directory only
            for path in (self.path.parent, self.path, self.logs):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise Failed(f"{self.path}: cannot be made: {error}", remedy="set DS_RUN_DIR to another") from error
        for path in (self.path.parent, self.path):
            if path.name.startswith("distserve-") or path == self.path:
                self._check_owner(path)

    def _check_owner(self, path: Path) -> None:
        if path.stat().st_uid != os.geteuid():
            raise Refused(f"{path} belongs to another user", remedy="set DS_RUN_DIR to a directory of your own")

    @contextmanager
    def locked(self, topology: Path) -> Iterator[None]:
        """Be this directory's supervisor inside the ``with`` block. Raises :class:`Refused` when there is one, and
        :class:`Failed` where the lock cannot be written."""
        with _writing(self._lock):
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._acquire(descriptor)
            content = msgspec.json.encode(Holder(os.getpid(), start_ticks(os.getpid()), str(topology)))
            with _writing(self._lock):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, content, 0)
            yield
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int) -> None:
        for _ in range(_LOCK_TRIES):
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE_S)
        raise already_runs(self.last_holder(), self.path)

    def rotate_logs(self) -> None:
        """Set the last run's logs aside; those of the run before it are lost."""
        for path in self.logs.glob("*.log"):
            path.replace(path.with_suffix(".log.1"))

    def read(self) -> RunRecord | None:
        """The state file, None when there is none."""
        try:
            return msgspec.json.decode(self._state.read_bytes(), type=RunRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, record: RunRecord) -> None:
        """Replace the state file. Raises :class:`Failed` where it cannot be written; the old one stays then."""
        made = self._state.with_suffix(".tmp")
        with _writing(self._state):
            made.write_bytes(msgspec.json.encode(record))
            made.replace(self._state)

    def forget(self) -> None:
        """Remove the state file."""
        self._state.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be written becomes a :class:`Failed`."""
    try:
        yield
    except OSError as error:
        raise Failed(
            f"{path} cannot be written: {error.strerror}", remedy="make room there, or set DS_RUN_DIR to another"
        ) from error


def already_runs(holder: Holder | None, run_dir: Path) -> Refused:
    """The error for a second supervisor."""
    who = f"pid {holder.pid}, {holder.topology}" if holder else str(run_dir)
    return Refused(f"it runs already ({who})", remedy="see `dsctl status`; `dsctl down` stops it")


def base(env: Mapping[str, str] = os.environ) -> Path:
    """Where run directories are unless ``DS_RUN_DIR`` names one; agrees with :func:`dstopology.load.load`."""
    return Path(f"/tmp/distserve-{os.getuid()}")


def locate(topology: Path, env: Mapping[str, str] = os.environ) -> RunDir | None:
    """The run directory of a topology file: that of its running supervisor, else that of its last run.

    The file itself is not read: it may have been changed, or broken, since the system was started from it.
    """
    chosen = env.get("DS_RUN_DIR")
    places = [Path(chosen).absolute()] if chosen else sorted(base().glob("*"))
    wanted = str(topology.resolve())
    found = []
    for run in map(RunDir, places):
        last = run.last_holder()
        if last is not None and last.topology == wanted:
            found.append(run)
    return max(found, key=lambda run: (run.holder() is not None, run.mtime()), default=None)
