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
from collections.abc import Iterable
from pathlib import Path

from dsctl.supervise.plan import Plan, ipc_paths
from dsctl.supervise.record import ProcessRecord, RunRecord, start_ticks
from dsctl.supervise.rundir import RunDir

#: longest wait for a process to be gone after SIGKILL
KILL_WAIT_S = 5.0


def clean(run: RunDir, plan: Plan) -> list[str]:
    """Remove everything; returns a line for each thing found."""
    told: list[str] = []
    record = run.read()
    if record is not None:
        told += [f"ended {process.name} (pid {process.pid})" for process in record.processes if end(process)]
        told += _segments(plan.topology.shm_dir, record.digest, (process.name for process in record.processes))
    names = [spec.name for spec in plan.specs]
    told += _segments(plan.topology.shm_dir, plan.topology.digest, names)
    for path in (*ipc_paths(plan), *(run.path / f"{name}.ready" for name in names)):
        if _remove(path):
            told.append(f"removed {path}")
    run.forget()
    return told


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


def alive(record: RunRecord) -> list[ProcessRecord]:
    """The processes of a run that are still there."""
    return [
        process
        for process in record.processes
        if process.pid is not None and start_ticks(process.pid) == process.start_ticks is not None
    ]


def _segments(shm_dir: Path, digest: str, names: Iterable[str]) -> list[str]:
    found = [path for name in names for path in sorted(shm_dir.glob(f"ds-{digest}-{name}.*"))]
    return [f"removed {path}" for path in found if _remove(path)]


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
