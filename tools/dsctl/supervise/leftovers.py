"""Remove what a run leaves behind: processes that outlived a killed supervisor, shared memory, sockets, files.

Used before a start and after a stop, by whoever holds the run directory's lock. Invariant: touches only what
belongs to the plan's own processes, or to those that the state file of the killed run names.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsctl.supervise.plan import Plan, ipc_paths
from dsctl.supervise.record import ProcessRecord, start_ticks
from dsctl.supervise.rundir import RunDir

#: longest wait for a process to be gone after SIGKILL
KILL_WAIT_S = 5.0


def clean(run: RunDir, plan: Plan) -> list[str]:
    """Remove the files of the plan's processes, none of which runs; returns a line for each thing removed."""
    names = [spec.name for spec in plan.specs]
    topology = plan.topology
    return _files(run, topology.shm_dir, topology.digest, names, ipc_paths(plan))


def clean_record(run: RunDir) -> list[str]:
    """End and remove what the state file of a killed run tells of; returns a line for each thing found."""
    record = run.read()
    if record is None:
        return []
    told = [f"ended {process.name} (pid {process.pid})" for process in record.processes if end(process)]
    names = [process.name for process in record.processes]
    told += _files(run, Path(record.shm_dir), record.digest, names, map(Path, record.sockets))
    return told


def _files(run: RunDir, shm_dir: Path, digest: str, names: Sequence[str], sockets: Iterable[Path]) -> list[str]:
    segments = [path for name in names for path in sorted(shm_dir.glob(f"ds-{digest}-{name}.*"))]
    ready = [run.path / f"{name}.ready" for name in names]
    meetings = [path for name in names for path in sorted(run.path.glob(f"{name}.ranks.*"))]
    run.forget()
    return [f"removed {path}" for path in (*segments, *sockets, *ready, *meetings) if _remove(path)]


def end(process: ProcessRecord) -> bool:
    """SIGKILL a process group of a killed run; whether it was still there."""
    if process.pid is None:
        return False
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # with the descriptor open the pid cannot be used again: now it is the same process, or it is not
        if process.start_ticks is None or start_ticks(process.pid) != process.start_ticks:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        select.select([descriptor], [], [], KILL_WAIT_S)
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> bool:
    """Remove a file or socket of ours; whether there was one."""
    try:
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
            return False
        path.unlink()
    except OSError:
        return False
    return True
