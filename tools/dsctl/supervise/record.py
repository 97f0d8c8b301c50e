"""What is known of a run, as ``state.json`` in its run directory tells it to other commands."""

from __future__ import annotations

from pathlib import Path

import msgspec


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process. Times are seconds since 1970."""

    name: str
    role: str
    node: str
    devices: tuple[str, ...]
    #: ``down``, ``starting``, ``ready``, ``stopping``, ``ended`` or ``given up``
    phase: str
    #: what it last said of its start
    step: str
    pid: int | None
    #: with ``pid`` names the process beyond doubt: pids are used again
    start_ticks: int | None
    restarts: int
    started_at: float | None
    ready_at: float | None
    #: how it crashed last, in words; "" when it never did
    crash: str
    crashed_at: float | None


class RunRecord(msgspec.Struct, frozen=True):
    """A run: one supervisor and its processes."""

    #: of the supervisor
    pid: int
    #: absolute path of the topology file
    topology: str
    digest: str
    nodes: tuple[str, ...]
    shm_dir: str
    #: paths of the Unix sockets that the processes bind
    sockets: tuple[str, ...]
    model: str
    #: where clients connect
    frontend: str
    #: directory of the keys that a client needs; None when nothing is encrypted
    keys_dir: str | None
    #: seconds from begin until everything served; None before
    ready_s: float | None
    stopping: bool
    processes: tuple[ProcessRecord, ...]


def start_ticks(pid: int) -> int | None:
    """When the process started, in kernel ticks since boot (field 22 of ``/proc/PID/stat``); None when gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the command's name, in parentheses, may hold spaces
    return int(stat.rpartition(")")[2].split()[19])
