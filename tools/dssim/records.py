"""What became of each request, and of the system meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dssim.processes import Step
from dswire.messages.client import Ledger
from dswire.messages.worker import Load


@dataclass(frozen=True, slots=True)
class Record:
    """One request, as its client saw it; times in seconds from its submission."""

    #: place in the workload
    number: int
    #: submission, from the beginning of the workload
    at_s: float
    prompt_tokens: int
    #: tokens received
    output_tokens: int
    #: until the first token; None when there was none
    first_s: float | None
    #: until the end
    total_s: float
    #: code of the error that it ended with; "" when it finished
    error: str
    #: the router's account of its stages; None when it failed
    ledger: Ledger | None

    @property
    def ttft_s(self) -> float:
        """Time to first token; endless for a request that failed."""
        return float("inf") if self.error or self.first_s is None else self.first_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 for a single token, endless for a request that failed."""
        if self.error or self.first_s is None:
            return float("inf")
        return (self.total_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass
class Observations:
    """What was seen inside."""

    #: whether to keep every step
    keep_steps: bool = False
    steps: list[Step] = field(default_factory=list)
    #: (time, instance, its load), once a second
    loads: list[tuple[float, str, Load]] = field(default_factory=list)
    #: seconds that each instance spent in steps
    busy_s: dict[str, float] = field(default_factory=dict)
    preemptions: int = 0
    #: (time, process, whether it came or went)
    failures: list[tuple[float, str, bool]] = field(default_factory=list)

    def step(self, step: Step) -> None:
        """A step begins."""
        self.busy_s[step.instance] = self.busy_s.get(step.instance, 0.0) + step.seconds
        if self.keep_steps:
            self.steps.append(step)

    def load(self, now: float, name: str, load: Load) -> None:
        """A worker tells its load."""
        self.loads.append((now, name, load))

    def preempted(self) -> None:
        """A sequence had to give way."""
        self.preemptions += 1


@dataclass(frozen=True, slots=True)
class Run:
    """A finished simulation."""

    #: in order of their ends
    records: tuple[Record, ...]
    #: from the first submission's time 0 until the last end
    simulated_s: float
    #: when the workload's time 0 was, in the clock of ``seen``
    begun_s: float
    #: that it took, by the clock on the wall and by the processor
    wall_s: float
    cpu_s: float
    #: happenings of the kernel
    happenings: int
    seen: Observations
    #: whatever a process still held of a request when all was quiet: empty unless there is a defect
    held: Mapping[str, int]
