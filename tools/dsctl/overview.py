"""What runs of a topology: the supervisor's word and the router's, joined by process name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from dsctl.supervise.record import ProcessRecord, RunRecord
from dsctl.supervise.rundir import locate
from dstopology.load import load
from dswire.errors import DsError, RouterLost
from dswire.messages.client import StatusReport, WorkerStatus

#: longest wait for the router's answer, in seconds
ROUTER_TIMEOUT_S = 1.0
GOOD = ("ready", "up")


@dataclass(frozen=True, slots=True)
class Row:
    """One process. What nobody knows of it is None."""

    name: str
    role: str
    node: str
    devices: tuple[str, ...]
    #: the supervisor's phase, or the router's state for a process of another host
    state: str
    pid: int | None
    restarts: int | None
    uptime_s: float | None
    #: how it crashed last, "" when it never did
    crash: str
    #: seconds since 1970
    crashed_at: float | None
    worker: WorkerStatus | None

    @property
    def good(self) -> bool:
        """Whether it serves, as far as anybody knows."""
        return self.state in GOOD and (self.worker is None or self.worker.state in GOOD)


@dataclass(frozen=True, slots=True)
class Overview:
    """A system as it is now."""

    topology: str
    model: str
    frontend: str
    #: of this host's supervisor; None when there is none, as in containers
    supervisor_pid: int | None
    rows: tuple[Row, ...]
    report: StatusReport | None
    #: why the router gave no report
    reason: str

    @property
    def running(self) -> bool:
        """Whether there is anything to see."""
        return self.supervisor_pid is not None or self.report is not None

    @property
    def good(self) -> bool:
        """Whether everything serves."""
        return self.report is not None and all(row.good for row in self.rows)


def overview(path: Path) -> Overview:
    """Ask everybody. Raises :class:`TopologyError` only when no supervisor runs and the file is bad."""
    run = locate(path)
    record = run.read() if run is not None and run.holder() is not None else None
    if record is not None:
        return _supervised(record)
    topology = load(path)
    encrypted = topology.security.encrypted
    report, reason = ask(topology.router.frontend_connect, topology.security.keys_dir if encrypted else None)
    rows = [_foreign(worker) for worker in report.workers] if report else []
    return Overview(
        str(path), topology.model.name, topology.router.frontend_connect, None, tuple(rows), report, reason
    )


def _supervised(record: RunRecord) -> Overview:
    report, reason = ask(record.frontend, Path(record.keys_dir) if record.keys_dir else None)
    workers = {worker.name: worker for worker in report.workers} if report else {}
    rows = [own_row(process, workers.pop(process.name, None)) for process in record.processes]
    rows += [_foreign(worker) for worker in workers.values()]
    return Overview(record.topology, record.model, record.frontend, record.pid, tuple(rows), report, reason)


def own_row(process: ProcessRecord, worker: WorkerStatus | None) -> Row:
    """The row of a process that this host's supervisor looks after."""
    return Row(
        name=process.name,
        role=process.role,
        node=process.node,
        devices=process.devices,
        state=process.step if process.phase == "starting" and process.step else process.phase,
        pid=process.pid,
        restarts=process.restarts,
        uptime_s=None if process.ready_at is None or process.phase != "ready" else time.time() - process.ready_at,
        crash=process.crash,
        crashed_at=process.crashed_at if process.crash else None,
        worker=worker,
    )


def _foreign(worker: WorkerStatus) -> Row:
    """A process that another host's supervisor, or none, looks after."""
    uptime_s = worker.uptime_s if worker.state == "up" else None
    return Row(worker.name, worker.role, worker.node, (), worker.state, None, None, uptime_s, "", None, worker)


def ask(address: str, keys_dir: Path | None) -> tuple[StatusReport | None, str]:
    """The router's report, or None and why."""
    from dsclient import Client
    from dswire.keys import load_system

    try:
        keys = load_system(keys_dir) if keys_dir is not None else None
        with Client(address, keys=keys, timeout_s=ROUTER_TIMEOUT_S) as client:
            return client.status(), ""
    except RouterLost:
        return None, f"the router does not answer at {address}"
    except DsError as error:
        return None, str(error)
