"""The supervisor's decisions: start, restart with back-off, give up, stop in order. No clock, no processes.

Invariants: a process is spawned only after the one before it under that name has exited; once stopping, nothing
is spawned; every SIGTERM is followed by an exit or, ``GRACE_S`` later, by a SIGKILL; every start ends within
``wait_s`` in readiness or death; ``Over`` comes exactly once, when nothing runs.

Stop order: router and gateway first, so that clients get their typed errors and workers their cancels while all
of them still listen; then prefill and decode, which give their handles back; the relays, who free what is left,
last. A tier that does not end within ``TIER_PATIENCE_S`` does not hold up the next.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

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
from dswire.errors import BadInput, ErrorInfo, Refused, StartFailed
from dswire.lifecycle import Lifecycle
from dswire.machine import Tick

#: wait before the first restart; doubles with every crash in a row
BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 10.0
#: a process that served this long begins its row of crashes anew
STEADY_S = 30.0
#: this many crashes in a row within ``CRASH_WINDOW_S``: give up on the process
CRASH_LIMIT = 5
CRASH_WINDOW_S = 60.0
#: between SIGTERM and SIGKILL
GRACE_S = 10.0
#: how long one tier's stop may hold up the next
TIER_PATIENCE_S = 3.0

#: tier in which a role is stopped
TIERS = {"router": 0, "gateway": 0, "prefill": 1, "decode": 1, "relay": 2, "rankhost": 2}
#: exit statuses that no restart mends: the input is wrong, or the process was refused
FINAL = (BadInput.exit_code, Refused.exit_code)


class Phase(Enum):
    """Where a process stands."""

    #: waits for its next start
    DOWN = "down"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    #: will not be started again by this supervisor
    ENDED = "ended"
    #: crashed too often
    GIVEN_UP = "given up"


_TABLE = {
    Phase.DOWN: frozenset({Phase.STARTING, Phase.ENDED}),
    Phase.STARTING: frozenset({Phase.READY, Phase.DOWN, Phase.STOPPING, Phase.ENDED, Phase.GIVEN_UP}),
    Phase.READY: frozenset({Phase.DOWN, Phase.STOPPING, Phase.ENDED, Phase.GIVEN_UP}),
    Phase.STOPPING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset[Phase](),
    Phase.GIVEN_UP: frozenset[Phase](),
}
#: phases in which there is an operating-system process
ALIVE = (Phase.STARTING, Phase.READY, Phase.STOPPING)


@dataclass(slots=True)
class Process:
    """One supervised process, over all its restarts."""

    name: str
    role: str
    life: Lifecycle[Phase]
    pid: int | None = None
    #: what it last said of its start
    step: str = ""
    restarts: int = 0
    #: times of the last crashes in a row
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=CRASH_LIMIT))
    #: length of the present row of crashes
    row: int = 0
    #: set in DOWN
    start_at: float | None = None
    #: set in STOPPING until the SIGKILL, and in a restart: the limit of its start
    kill_at: float | None = None
    #: the reason it gave for its next end
    error: ErrorInfo | None = None
    #: how it crashed last, in words; "" when it never did
    crash: str = ""

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        return self.life.phase


class Machine:
    """The supervisor's pure core. ``processes``: (name, role) in starting order; ``wait_s``: limit of the start."""

    def __init__(self, processes: Sequence[tuple[str, str]], wait_s: float, now: float) -> None:
        self.processes = {
            name: Process(name, role, Lifecycle(name, _TABLE, Phase.DOWN, now)) for name, role in processes
        }
        self._wait_s = wait_s
        self._began = now
        #: every process has served; from then on a refusal is a crash like any other
        self.was_ready = False
        #: when the stop began
        self.stopping_since: float | None = None
        self._tier = -1
        self._tier_since = 0.0
        self._exit_code = 0
        self._error: ErrorInfo | None = None
        self._over = False

    def handle(self, event: Event | Tick) -> list[Action]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case Begin():
                self._began = event.now
                return [self._start(process, event.now) for process in self.processes.values()]
            case Spawned():
                self.processes[event.name].pid = event.pid
                return []
            case SpawnFailed():
                return self._ended(self.processes[event.name], event.now, f"could not be started: {event.reason}")
            case Reported():
                return self._reported(self.processes[event.name], event)
            case Told():
                self.processes[event.name].error = event.error
                return []
            case Exited():
                return self._exited(self.processes[event.name], event)
            case StopWanted():
                return self._stop_wanted(event.now)
            case Tick():
                return self._tick(event.now)

    def next_deadline(self) -> float | None:
        """When to send the next ``Tick``; None for never."""
        times = [time for process in self.processes.values() for time in (process.start_at, process.kill_at)]
        if self.stopping_since is None:
            times.append(None if self.was_ready else self._began + self._wait_s)
        elif self._tier < max(TIERS.values()) and not self._over:
            times.append(self._tier_since + TIER_PATIENCE_S)
        return min((time for time in times if time is not None), default=None)

    def validate(self) -> None:
        """Check every invariant. Raises ``AssertionError``."""
        for process in self.processes.values():
            tale = process.life.tell()
            assert process.pid is None or process.phase in ALIVE, tale
            assert (process.kill_at is None) or process.phase in (Phase.STARTING, Phase.STOPPING), tale
            assert (process.start_at is None) or process.phase is Phase.DOWN, tale
            if self.stopping_since is not None:
                assert process.phase is not Phase.DOWN, tale
            if self._over:
                assert process.phase not in ALIVE, tale

    # start

    def _start(self, process: Process, now: float) -> Action:
        process.life.move(Phase.STARTING, now, "start")
        process.start_at, process.step, process.error = None, "", None
        # the first start of all has one limit for everybody
        process.kill_at = now + self._wait_s if self.was_ready else None
        return Spawn(process.name)

    def _reported(self, process: Process, event: Reported) -> list[Action]:
        process.step = event.step
        if event.step != "ready" or process.phase is not Phase.STARTING:
            return []
        process.life.move(Phase.READY, event.now, "it said so")
        process.kill_at = None
        actions: list[Action] = []
        if process.restarts:
            actions.append(Note(process.name, "info", "serves again"))
        if not self.was_ready and all(one.phase is Phase.READY for one in self.processes.values()):
            self.was_ready = True
            actions.append(AllReady(event.now - self._began))
        return actions

    # ends

    def _exited(self, process: Process, event: Exited) -> list[Action]:
        if self.stopping_since is not None:
            how = "stopped" if event.status == 0 else f"stopped ({describe(event.status)})"
            self._end(process, Phase.ENDED, event.now, how)
            return [Note(process.name, "info", how), *self._advance(event.now)]
        if not self.was_ready and event.status in FINAL:
            error = process.error or _unexplained(process.name, event.status)
            self._end(process, Phase.ENDED, event.now, error.message)
            return self._fail(event.now, error, event.status)
        words = event.last_words if process.error is None else ""
        return self._ended(process, event.now, describe(event.status) + (f": {words}" if words else ""))

    def _ended(self, process: Process, now: float, how: str) -> list[Action]:
        """It crashed: it is started again later, or given up."""
        if process.error is not None:
            how = f"{how}: {process.error.message}"
        if process.phase is Phase.READY and now - process.life.since >= STEADY_S:
            process.crashes.clear()
            process.row = 0
        process.row += 1
        process.crashes.append(now)
        process.crash = how
        if len(process.crashes) == CRASH_LIMIT and now - process.crashes[0] <= CRASH_WINDOW_S:
            return self._give_up(process, now, how)
        wait_s = min(BACKOFF_MIN_S * 2 ** (process.row - 1), BACKOFF_MAX_S)
        self._end(process, Phase.DOWN, now, how)
        process.start_at = now + wait_s
        return [Note(process.name, "warning", f"{how}; starts again in {wait_s:g} s")]

    def _give_up(self, process: Process, now: float, how: str) -> list[Action]:
        self._end(process, Phase.GIVEN_UP, now, how)
        text = f"crashed {CRASH_LIMIT} times within {CRASH_WINDOW_S:g} s, and is not started again ({how})"
        self._exit_code = StartFailed.exit_code
        if self.was_ready:
            left = any(one.phase is not Phase.GIVEN_UP for one in self.processes.values())
            return [Note(process.name, "error", text), *([] if left else self._stop(now))]
        remedy = f"`dsctl logs {process.name}` tells why"
        return self._fail(now, ErrorInfo(StartFailed.code, f"{process.name}: {text}", remedy), self._exit_code)

    def _end(self, process: Process, phase: Phase, now: float, why: str) -> None:
        process.life.move(phase, now, why)
        process.pid = process.kill_at = None

    # stop

    def _stop_wanted(self, now: float) -> list[Action]:
        if self.stopping_since is None:
            return self._stop(now)
        actions: list[Action] = []
        for process in self.processes.values():
            actions += self._terminate(process, now)
            if process.phase is Phase.STOPPING:
                process.kill_at = None
                actions.append(Kill(process.name))
        return actions

    def _fail(self, now: float, error: ErrorInfo, exit_code: int) -> list[Action]:
        if self.stopping_since is not None:
            return []
        self._error, self._exit_code = error, exit_code
        return self._stop(now)

    def _stop(self, now: float) -> list[Action]:
        self.stopping_since = now
        for process in self.processes.values():
            process.start_at = None
            if process.phase is Phase.DOWN:
                self._end(process, Phase.ENDED, now, "stopped before its next start")
        return self._advance(now)

    def _advance(self, now: float) -> list[Action]:
        """Stop the next tier when the present one is gone or was given its time."""
        actions: list[Action] = []
        while self._tier < max(TIERS.values()):
            busy = any(self._tier_of(one) <= self._tier and one.phase in ALIVE for one in self.processes.values())
            if busy and now < self._tier_since + TIER_PATIENCE_S:
                break
            self._tier, self._tier_since = self._tier + 1, now
            for process in self.processes.values():
                if self._tier_of(process) == self._tier:
                    actions += self._terminate(process, now)
        if not self._over and all(one.phase not in ALIVE for one in self.processes.values()):
            self._over = True
            actions.append(Over(self._exit_code, self._error))
        return actions

    def _terminate(self, process: Process, now: float) -> list[Action]:
        if process.phase not in (Phase.STARTING, Phase.READY):
            return []
        process.life.move(Phase.STOPPING, now, "stop")
        process.kill_at = now + GRACE_S
        return [Terminate(process.name)]

    def _tier_of(self, process: Process) -> int:
        return TIERS[process.role]

    # time

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for process in self.processes.values():
            if process.start_at is not None and now >= process.start_at:
                process.restarts += 1
                actions.append(self._start(process, now))
            if process.kill_at is not None and now >= process.kill_at:
                process.kill_at = None
                what = "does not stop" if process.phase is Phase.STOPPING else f"not ready in {self._wait_s:g} s"
                actions += [Note(process.name, "warning", f"{what}, killed"), Kill(process.name)]
        if self.stopping_since is not None:
            return actions + self._advance(now)
        if not self.was_ready and now >= self._began + self._wait_s:
            return actions + self._fail(now, self._late(), StartFailed.exit_code)
        return actions

    def _late(self) -> ErrorInfo:
        late = [one for one in self.processes.values() if one.phase is not Phase.READY]
        told = ", ".join(f"{one.name} ({one.step or one.phase.value})" for one in late)
        return ErrorInfo(
            StartFailed.code,
            f"not ready within {self._wait_s:g} s: {told}",
            f"`dsctl logs {late[0].name}` tells what it waits for; --wait-s allows more time",
        )


def _unexplained(name: str, status: int) -> ErrorInfo:
    code = BadInput.code if status == BadInput.exit_code else Refused.code
    return ErrorInfo(code, f"{name}: {describe(status)}", f"`dsctl logs {name}` tells why")


def describe(status: int) -> str:
    """An exit status in words."""
    if status == 0:
        return "ended by itself"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
