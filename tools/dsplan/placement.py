"""A system: which instances, how many, and in which mode; what it can do; and the answer that a search gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsplan.goodput import NONE, Counts, Goodput
from dsplan.question import Question
from dsplan.search import High, Low, Parallel, Tried

#: tokens of a step that hold any prompt whole
WHOLE = 1 << 20


@dataclass(frozen=True, slots=True)
class Group:
    """All replicas of one phase."""

    parallel: Parallel
    replicas: int

    @property
    def devices(self) -> int:
        """Of the group."""
        return self.parallel.devices * self.replicas

    def __str__(self) -> str:
        return f"{self.replicas} x {self.parallel}"


@dataclass(frozen=True, slots=True)
class Spec:
    """A system. In mode colocated there are no replicas of prefill."""

    #: high, low, or "" in mode colocated
    algorithm: str
    prefill: Group
    decode: Group
    mode: str = "disaggregated"
    #: stages that Algorithm 2 spread over nodes
    stages: int = 1
    #: modes colocated and conditional: tokens of a step of decode instances
    budget: int = 0
    #: mode conditional: prompts of fewer tokens are read by decode instances
    threshold: int = 0
    #: mode colocated: which kind of the question's hardware
    kind: int = -1

    @property
    def devices(self) -> int:
        """All."""
        return self.prefill.devices + self.decode.devices

    def __str__(self) -> str:
        if self.mode == "colocated":
            step = "whole prompts" if self.budget >= WHOLE else f"{self.budget} tokens"
            return f"{self.decode} colocated, {step} a step"
        words = f"prefill {self.prefill}, decode {self.decode}"
        return words if self.mode == "disaggregated" else f"{words}, prompts below {self.threshold} at decode"


@dataclass(frozen=True, slots=True)
class Placement:
    """A system and its joint goodput."""

    spec: Spec
    #: of the whole system
    goodput: Goodput
    #: what became of the requests a little above its goodput
    beyond: Counts
    #: the phase that cannot do more without end, where that and no objective limits the goodput; "" otherwise
    saturated: str
    #: price an hour, where it is known
    price: float | None = None
    #: whether the goodput is the simulator's; else it is the search's
    simulated: bool = False

    @property
    def per_device(self) -> Goodput:
        """Goodput per device."""
        one, devices = self.goodput, self.spec.devices
        return Goodput(one.rate / devices, one.low / devices, one.high / devices)

    @property
    def by(self) -> str:
        """Whose word its goodput is."""
        return "simulator" if self.simulated else "search"

    def cost(self, mean_output: float) -> float | None:
        """Of a million output tokens at the goodput."""
        if self.price is None or self.goodput.rate == 0.0:
            return None
        return self.price / 3600 / (self.goodput.rate * mean_output) * 1e6

    @property
    def worth(self) -> float:
        """What placements are compared by: goodput for the price, or per device where prices are not known."""
        return self.goodput.rate / self.price if self.price else self.per_device.rate


@dataclass(slots=True)
class Plan:
    """The answer."""

    question: Question
    chosen: Placement
    #: the best of each algorithm and mode, by falling worth
    placements: list[Placement]
    high: High | None
    low: Low | None
    mixed: tuple[Tried, ...] = ()
    notes: list[str] = field(default_factory=list)
    search_s: float = 0.0
    #: the chosen system's goodput at 99 % attainment
    strict: Goodput = NONE
    #: the best system that the servers can start, where that is not the choice
    startable: Placement | None = None

    def system(self, spec: Spec) -> str:
        """A system in words; where there are two kinds of devices, with the one that both phases are on."""
        kinds = self.question.kinds
        named = spec.mode == "colocated" and len(kinds) > 1
        return f"{spec}, on {kinds[spec.kind].device.name}" if named else str(spec)
