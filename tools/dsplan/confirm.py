"""The chosen placement in the simulator: the servers' own schedulers, message by message.

A run at the goodput that the search found; where too few requests meet their objectives there, a few more below,
for the highest rate at which enough do. So it is done with the best of another mode, the runner-up, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsplan.latency import Instance as PlannedInstance
from dsplan.latency import Steps
from dsplan.linear import LinearInstance
from dsplan.memory import BLOCK_TOKENS
from dsplan.placement import Placement, Plan
from dsplan.topology_file import text
from dssim.times import StepTimes
from dstopology.resolved import Instance
from dswire.errors import DsError


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Joint attainment in the simulator at a rate, with its 95 % interval."""

    mode: str
    requests: int
    rate: float
    attainment: float
    low: float
    high: float


#: times as many requests are simulated where the simulator is compiled
COMPILED = 5
#: halvings of the range between no load and the search's goodput
HALVINGS = 4


def checked(plan: Plan, requests: int) -> list[Confirmation]:
    """The choice at the highest rate that the simulator agrees to, and the runner-up; notes say what it thinks."""
    found = []
    try:
        runs = confirmations(plan, requests)
    except DsError as error:
        plan.notes.append(f"not checked in the simulator: {error.message}")
        return []
    found.append(agreed(plan, runs))
    chosen = plan.chosen
    if found[0].rate < chosen.goodput.rate:
        plan.notes.append(
            f"the simulator is less hopeful: {runs[0].attainment:.1%} at {runs[0].rate:.3g} requests/s, and its "
            f"own goodput is about {found[0].rate:.3g} ({found[0].rate / chosen.spec.devices:.3g} a device)"
        )
    rival = next((one for one in plan.placements if one.spec.mode != chosen.spec.mode), None)
    if rival is None:
        return found
    try:
        found.append(agreed(plan, confirmations(plan, requests, rival)))
    except DsError as error:
        plan.notes.append(f"mode {rival.spec.mode} was not checked in the simulator: {error.message}")
        return found
    worth = [run.rate * one.worth / one.goodput.rate for run, one in zip(found, (chosen, rival), strict=True)]
    if worth[1] > worth[0]:
        plan.notes.append(
            f"by the simulator's own goodputs mode {rival.spec.mode} is {worth[1] / worth[0] - 1:.0%} ahead: the "
            "verdict is open"
        )
    return found


def confirmations(plan: Plan, requests: int, one: Placement | None = None) -> list[Confirmation]:
    """The runs, by falling rate; the last that attains the target, if any does, is :func:`agreed`."""
    rate = (one or plan.chosen).goodput.rate
    runs = [confirm(plan, requests, rate, one)]
    low, high = 0.0, rate
    while runs[0].attainment < plan.question.slo.attainment and len(runs) <= HALVINGS:
        middle = (low + high) / 2 if low else high * 0.75
        runs.append(confirm(plan, requests, middle, one))
        low, high = (middle, high) if runs[-1].attainment >= plan.question.slo.attainment else (low, middle)
    return sorted(runs, key=lambda run: -run.rate)


def agreed(plan: Plan, runs: Sequence[Confirmation]) -> Confirmation:
    """The run with the highest rate that attains the target; the one with the most attainment where none does."""
    good = [one for one in runs if one.attainment >= plan.question.slo.attainment]
    return max(good, key=lambda one: one.rate) if good else max(runs, key=lambda one: one.attainment)


def steps(instance: PlannedInstance) -> StepTimes:
    """Times for the simulator, which is compiled for those of the linear form."""
    return instance.steps() if isinstance(instance, LinearInstance) else Steps(instance)


def confirm(plan: Plan, requests: int, rate: float, one: Placement | None = None) -> Confirmation:
    """Simulate ``requests`` of the same workload on the choice, or on ``one``. Links are the device table's.

    Raises :class:`DsError` for what the simulator or a topology does not know.
    """
    from dskv.layout import KvLayout
    from dssim.express.run import run as express
    from dssim.statistics import summarize
    from dssim.system import System
    from dssim.times import FlatTransfer
    from dssim.workload import Arrival
    from dstopology import resolved
    from dstopology.load import load

    question, shape, spec = plan.question, plan.question.shape, (one or plan.chosen).spec
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "topology.yaml"
        path.write_text(text(plan, one), encoding="utf-8")
        topology = load(path, {"DS_RUN_DIR": directory, "DS_HOME": directory, "DS_KEYS_DIR": directory})
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, BLOCK_TOKENS, topology.model.dtype)
    devices = [kind.device for kind in question.kinds]
    transfer = FlatTransfer(
        seal_bytes_per_s=0.0,
        copy_bytes_per_s=min(device.node_bytes_per_s for device in devices),
        network_bytes_per_s=min(device.network_bytes_per_s for device in devices),
    )

    def times(instance: Instance) -> StepTimes:
        hardware = question.kinds[0 if instance.role == "prefill" else spec.kind]
        return steps(hardware.latency.instance(instance.tp, instance.pp))

    drawn = [Arrival(at / rate, prompt, output) for at, prompt, output in question.workload.requests]
    # many requests where that costs little
    run = express(topology, layout, times, transfer, drawn[: requests * COMPILED])
    if run is None:
        run = System(topology, layout, times, transfer).run(drawn[:requests])
    slo = resolved.Slo(question.slo.ttft_s, question.slo.tpot_s, question.slo.attainment)
    found = summarize(run.records, slo, run.simulated_s).attainment
    return Confirmation(topology.mode, len(run.records), rate, found.value, found.low, found.high)
