"""What every study has in common: its setting, and what it gives.

All by the queueing oracle and the latency models of :mod:`dsplan`; a sentence is written from the numbers of the
run, so that with other models or devices it may say the opposite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from dsplan import reach
from dsplan.devices import Device, find_device
from dsplan.drawing import Panel
from dsplan.goodput import Slo, make_workload
from dsplan.latency import Latency
from dsplan.linear import distserve_latency, profiled
from dsplan.planner import Planner, Progress, silent
from dsplan.question import Question
from dsplan.roofline import STACKS, RooflineLatency
from dsplan.shapes import ModelShape, find_model


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study is of."""

    model: str
    device: str = "a100-80g"
    workload: str = "sharegpt"
    ttft_s: float = 0.25
    tpot_s: float = 0.1
    nodes: int = 1
    devices_per_node: int = 8
    seed: int = 0
    progress: Progress = silent

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return find_model(self.model)

    @property
    def hardware(self) -> Device:
        """The device."""
        return find_device(self.device)

    @property
    def slo(self) -> Slo:
        """Both objectives, for 90 %."""
        return Slo(self.ttft_s, self.tpot_s)

    def latency(self) -> Latency:
        """DistServe's published profile where there is one, else the roofline."""
        if profiled(self.shape.name, self.hardware.name):
            return distserve_latency(self.shape.name, self.hardware.name)
        return RooflineLatency(self.shape, self.hardware, STACKS["graphs"], self.devices_per_node)

    def question(self, **changes: Any) -> Question:
        """To the planner."""
        given: dict[str, Any] = {
            "shape": self.shape,
            "device": self.hardware,
            "latency": self.latency(),
            "nodes": self.nodes,
            "devices_per_node": self.devices_per_node,
            "workload": make_workload(self.workload, seed=self.seed),
            "slo": self.slo,
        }
        return Question(**(given | changes))

    def __str__(self) -> str:
        return f"{self.shape.name} on {self.device}, {self.workload}"


@dataclass(frozen=True, slots=True)
class Study:
    """What came out."""

    title: str
    #: what holds and what does not
    sentences: list[str]
    #: the data, all rows with the same keys
    rows: list[dict[str, Any]]
    panels: list[Panel] = field(default_factory=list)


#: relative difference of goodputs that their precision does not tell apart
EQUAL = 0.03


def held(ratio: float) -> str:
    """Whether a claim that something is better holds, by how many times as good it is."""
    if abs(ratio - 1) < EQUAL:
        return "does not hold, both are equally good"
    return "holds" if ratio > 1 else "does not hold"


def refuse(question: Question) -> NoReturn:
    """Raise what is wrong with a question to which no system is an answer: :class:`UnreachableSlo` or
    :class:`DoesNotFit`."""
    reach.bounded(question, sorted(Planner(question).allowed[0]))
    reach.explain(question)


def crossing(first: dict[float, float], second: dict[float, float]) -> float | None:
    """Where the lower of two curves over the same x ceases to be, by straight lines; None where it never does."""
    xs = sorted(set(first) & set(second))
    for left, right in pairwise(xs):
        before, after = first[left] - second[left], first[right] - second[right]
        if before * after < 0:
            return left + (right - left) * before / (before - after)
    return None
