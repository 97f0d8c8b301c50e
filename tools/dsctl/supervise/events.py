"""What the supervisor's machine is told, and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dswire.errors import ErrorInfo

# events


@dataclass(frozen=True, slots=True)
class Begin:
    """Start everything."""

    now: float


@dataclass(frozen=True, slots=True)
class Spawned:
    """A wanted process exists."""

    now: float
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """A wanted process could not be made."""

    now: float
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A process told how far its start is; ``step`` is ``ready`` at last."""

    now: float
    name: str
    step: str


@dataclass(frozen=True, slots=True)
class Told:
    """A process told why it is about to end."""

    now: float
    name: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Exited:
    """A process is gone, and its whole process group with it."""

    now: float
    name: str
    #: exit status, or minus the number of the signal that killed it
    status: int
    #: the last line of its output that is no log line: what Python or a library said as it died; "" for none
    last_words: str = ""


@dataclass(frozen=True, slots=True)
class StopWanted:
    """Somebody wants everything down in good order; a second time: at once."""

    now: float


# actions


@dataclass(frozen=True, slots=True)
class Spawn:
    """Make the process; ``Spawned`` or ``SpawnFailed`` follows."""

    name: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask the process to end: SIGTERM."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process and its group: SIGKILL."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Tell people what happened to a process."""

    name: str
    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True, slots=True)
class AllReady:
    """Every process serves, for the first time."""

    took_s: float


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing runs any more. The last action."""

    exit_code: int
    #: why it ended, unless it was asked to
    error: ErrorInfo | None


Event = Begin | Spawned | SpawnFailed | Reported | Told | Exited | StopWanted
Action = Spawn | Terminate | Kill | Note | AllReady | Over
