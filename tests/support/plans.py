"""A small question for the planner."""

from __future__ import annotations

import dataclasses

from dsplan.devices import find_device
from dsplan.goodput import Slo, make_workload
from dsplan.linear import distserve_latency
from dsplan.question import Question
from dsplan.shapes import find_model


def question(**changes: object) -> Question:
    """OPT-13B on three A100s, with ``changes``."""
    base = Question(
        shape=find_model("OPT-13B"),
        device=find_device("a100-80g"),
        latency=distserve_latency("OPT-13B", "a100-80g"),
        nodes=1,
        devices_per_node=3,
        workload=make_workload("sharegpt", 2000),
        slo=Slo(0.25, 0.1),
        modes=("disaggregated",),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]
