"""The supervisor: performs what ``dsctl.supervise.state`` decides, and keeps ``state.json`` true.

Invariants: every process it made is gone when :func:`supervise` returns or raises, and what they leave on the host
(shared memory, sockets, ready files) is removed; when the supervisor is killed, the end of its lifeline pipe ends
them. It holds the run directory's lock for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import structlog

from dsctl.supervise.child import Child, last_words
from dsctl.supervise.events import (
    Action,
    AllReady,
    Begin,
    Event,
    Exited,
    Kill,
    Note,
    Over,
    Reported,
    Spawn,
    Spawned,
    SpawnFailed,
    StopWanted,
    Terminate,
    Told,
)
from dsctl.supervise.leftovers import clean, clean_record
from dsctl.supervise.plan import Plan, Spec, ipc_paths
from dsctl.supervise.record import ProcessRecord, RunRecord, start_ticks
from dsctl.supervise.rundir import RunDir
from dsctl.supervise.state import Machine, Process
from dswire.errors import ErrorInfo, Failed
from dswire.machine import Tick

log = structlog.get_logger()

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class View(Protocol):
    """Where people, or another process, see how it goes."""

    def show(self, record: RunRecord) -> None:
        """Something changed."""

    def note(self, note: Note) -> None:
        """Something happened to a process."""

    def ready(self, record: RunRecord) -> None:
        """Everything serves, for the first time."""

    def over(self, over: Over) -> None:
        """Nothing runs any more."""


class _Report(msgspec.Struct):
    """A line that a process writes to ``DS_REPORT_FD``, see dswire.process."""

    phase: str | None = None
    error: ErrorInfo | None = None


def supervise(plan: Plan, run: RunDir, view: View, wait_s: float) -> Over:
    """Run the plan to its end; the caller holds the lock of ``run``."""
    for line in [*clean_record(run), *clean(run, plan)]:
        log.info("left by an earlier run", what=line)
    try:
        return asyncio.run(_Supervisor(plan, run, view, wait_s).run())
    finally:
        clean(run, plan)


class _Supervisor:
    def __init__(self, plan: Plan, run: RunDir, view: View, wait_s: float) -> None:
        self._plan = plan
        self._run = run
        self._view = view
        self._wait_s = wait_s
        self._specs = {spec.name: spec for spec in plan.specs}
        self._children: dict[str, Child] = {}
        self._events: deque[Event | Tick] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._ready_s: float | None = None
        self._started_at: dict[str, float] = {}
        self._ready_at: dict[str, float] = {}
        self._crashed_at: dict[str, float] = {}

    async def run(self) -> Over:
        """Start, supervise, stop."""
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[Over] = self._loop.create_future()
        self._machine = Machine([(one.name, one.role) for one in self._plan.specs], self._wait_s, self._loop.time())
        with _pipe() as self._lifeline, self._signals():
            try:
                self._feed(Begin(self._loop.time()))
                return await self._done
            finally:
                for child in self._children.values():
                    child.kill_and_reap()
                if self._timer is not None:
                    self._timer.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._callback(self._stop))
        yield
        for number in STOP_SIGNALS:
            self._loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self._feed(StopWanted(self._loop.time()))

    # events in, actions out

    def _feed(self, event: Event | Tick) -> None:
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        actions: list[Action] = []
        try:
            while self._events:
                now_wanted = self._machine.handle(self._events.popleft())
                actions += now_wanted
                for action in now_wanted:
                    self._perform(action)
        finally:
            self._busy = False
        # whoever is told something must find it in the state file
        self._publish()
        for action in actions:
            self._tell(action)
        self._set_timer()

    def _perform(self, action: Action) -> None:
        match action:
            case Spawn(name):
                self._spawn(self._specs[name])
            case Terminate(name):
                self._children[name].terminate()
            case Kill(name):
                self._children[name].kill()
            case AllReady(took_s):
                self._ready_s = took_s
            case _:
                pass

    def _tell(self, action: Action) -> None:
        match action:
            case Note(name, level, text):
                log.log(LEVELS[level], text, about=name)
                self._view.note(action)
            case AllReady(took_s):
                log.info("all ready", took_s=round(took_s, 3))
                self._view.ready(self._record())
            case Over(exit_code, error):
                log.info("over", exit_code=exit_code, error=error.message if error else None)
                self._view.over(action)
                self._done.set_result(action)
            case _:
                pass

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._machine.next_deadline()
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._callback(self._tick))

    def _tick(self) -> None:
        # the loop may call a little early, by its clock's resolution
        deadline = self._machine.next_deadline() or 0.0
        self._feed(Tick(max(self._loop.time(), deadline)))

    def _callback(self, function: Callable[..., None], *arguments: object) -> Callable[..., None]:
        """``function``, an exception of which ends the supervisor instead of being logged by the loop."""

        @functools.wraps(function)
        def guarded(*more: object) -> None:
            try:
                function(*arguments, *more)
            except Exception as error:  # noqa: BLE001 (process boundary: a defect here must leave no process behind)
                if not self._done.done():
                    self._done.set_exception(error)

        return guarded

    # processes

    def _spawn(self, spec: Spec) -> None:
        now = self._loop.time()
        self._started_at[spec.name] = time.time()
        self._ready_at.pop(spec.name, None)
        try:
            child = Child(
                spec.command,
                env={**os.environ, "DS_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"},
                log=self._run.log_of(spec.name),
                lifeline=self._lifeline,
                on_report=self._callback(self._reported, spec.name),
                on_exit=self._callback(self._exited, spec.name),
            )
        except OSError as error:
            self._feed(SpawnFailed(now, spec.name, str(error)))
            return
        self._children[spec.name] = child
        log.info("started", about=spec.name, pid=child.pid)
        self._feed(Spawned(now, spec.name, child.pid))

    def _reported(self, name: str, line: bytes) -> None:
        try:
            report = msgspec.json.decode(line, type=_Report)
        except msgspec.DecodeError:
            log.warning("a report that cannot be read", about=name, line=line[:200].decode(errors="replace"))
            return
        now = self._loop.time()
        if report.error is not None:
            self._feed(Told(now, name, report.error))
        if report.phase is not None:
            if report.phase == "ready":
                self._ready_at[name] = time.time()
            self._feed(Reported(now, name, report.phase))

    def _exited(self, name: str, status: int) -> None:
        del self._children[name]
        self._crashed_at[name] = time.time()
        words = last_words(self._run.log_of(name)) if status else ""
        self._feed(Exited(self._loop.time(), name, status, words))

    # what others see

    def _publish(self) -> None:
        record = self._record()
        try:
            self._run.write(record)
        except Failed as error:
            # what serves goes on serving: a full disk costs others the news, and nobody an answer
            if self._ready_s is None and not record.stopping:
                raise
            log.warning(error.message, remedy=error.remedy)
        self._view.show(record)

    def _record(self) -> RunRecord:
        topology = self._plan.topology
        return RunRecord(
            pid=os.getpid(),
            topology=str(topology.path),
            digest=topology.digest,
            nodes=self._plan.nodes,
            shm_dir=str(topology.shm_dir),
            sockets=tuple(map(str, ipc_paths(self._plan))),
            model=topology.model.name,
            frontend=topology.router.frontend_connect,
            keys_dir=str(topology.security.keys_dir) if topology.security.encrypted else None,
            ready_s=self._ready_s,
            stopping=self._machine.stopping_since is not None,
            processes=tuple(self._process(one) for one in self._machine.processes.values()),
        )

    def _process(self, process: Process) -> ProcessRecord:
        spec = self._specs[process.name]
        return ProcessRecord(
            name=process.name,
            role=process.role,
            node=spec.node,
            devices=spec.devices,
            phase=process.phase.value,
            step=process.step,
            pid=process.pid,
            start_ticks=None if process.pid is None else start_ticks(process.pid),
            restarts=process.restarts,
            started_at=self._started_at.get(process.name),
            ready_at=self._ready_at.get(process.name),
            crash=process.crash,
            crashed_at=self._crashed_at.get(process.name),
        )


@contextlib.contextmanager
def _pipe() -> Iterator[int]:
    """The lifeline: its read end goes to every process; the write end is ours alone, and ends with us."""
    read_end, write_end = os.pipe()
    try:
        yield read_end
    finally:
        os.close(read_end)
        os.close(write_end)
