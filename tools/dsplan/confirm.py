"""The chosen placement in the simulator: the servers' own schedulers, message by message.

A run at the goodput that the search found; where too few requests meet their objectives there, a few more below,
for the highest rate at which enough do. So it is done with the best of another mode, the runner-up, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsobserve.terminal import digits
from dsplan.goodput import Goodput
from dsplan.latency import Instance as PlannedInstance
from dsplan.latency import Steps
from dsplan.linear import LinearInstance
from dsplan.memory import BLOCK_TOKENS
from dsplan.placement import Placement, Plan, Spec
from dsplan.question import Question
from dsplan.topology_file import document, dumped
from dssim.records import Run
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
    """The choice at the highest rate that the simulator agrees to, and the best of another mode that it can run;
    notes say what it thinks, and the goodputs of the plan become the simulator's where those are less."""
    chosen = plan.chosen
    found: list[tuple[Placement, Confirmation]] = []
    refused: dict[str, list[str]] = {}
    for one in (chosen, *(other for other in plan.placements if other.spec.mode != chosen.spec.mode)):
        try:
            runs = confirmations(plan, requests, one)
        except DsError as error:
            refused.setdefault(error.message, []).append(one.spec.mode)
            continue
        found.append((one, agreed(plan, runs)))
        if one is not chosen:
            break
        if found[0][1].rate < chosen.goodput.rate:
            plan.notes.append(_less(chosen, runs[0], found[0][1]))
    for message, modes in refused.items():
        plan.notes.append(f"not checked in the simulator, mode {' and '.join(dict.fromkeys(modes))}: {message}")
    if len(found) == 2:
        worth, rivals = (run.rate * one.worth / one.goodput.rate for one, run in found)
        if rivals > worth:
            plan.notes.append(
                f"by the simulator's own goodputs mode {found[1][0].spec.mode} is {rivals / worth - 1:.0%} ahead: "
                "the verdict is open"
            )
    for one, run in found:
        _correct(plan, one, run)
    plan.placements.sort(key=lambda one: (one is plan.chosen, one.worth), reverse=True)
    return [run for _, run in found]


def _correct(plan: Plan, one: Placement, run: Confirmation) -> None:
    """Where the simulator agrees to less than the search found, that is the goodput; the interval holds both."""
    own, hopeful = run.rate, one.goodput
    if own >= hopeful.rate or run.attainment < plan.question.slo.attainment:
        return
    better = replace(one, goodput=Goodput(own, min(hopeful.low, own), hopeful.high))
    plan.placements = [better if other is one else other for other in plan.placements]
    if one is plan.chosen:
        plan.chosen = better
        if plan.strict.rate > own:
            plan.strict = Goodput(own, own, own)


def _less(one: Placement, run: Confirmation, own: Confirmation) -> str:
    """The simulator finds less than the search did."""
    return (
        f"the simulator is less hopeful: {run.attainment:.1%} at {digits(run.rate)} requests/s, and its own "
        f"goodput is about {digits(own.rate)} ({digits(own.rate / one.spec.devices)} a device)"
    )


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
    from dssim.statistics import summarize
    from dstopology import resolved

    question = plan.question
    mode, run = simulated(question, (one or plan.chosen).spec, rate, requests, requests * COMPILED)
    slo = resolved.Slo(question.slo.ttft_s, question.slo.tpot_s, question.slo.attainment)
    found = summarize(run.records, slo, run.simulated_s).attainment
    return Confirmation(mode, len(run.records), rate, found.value, found.low, found.high)


def simulated(question: Question, spec: Spec, rate: float, requests: int, compiled: int) -> tuple[str, Run]:
    """The mode, and the run of the question's first ``requests`` at a rate; of ``compiled`` if the simulator is."""
    from dskv.layout import KvLayout
    from dssim.express.run import run as express
    from dssim.system import System
    from dssim.times import FlatTransfer
    from dssim.workload import Arrival
    from dstopology.load import load

    shape = question.shape
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "topology.yaml"
        path.write_text(dumped(document(question, spec)), encoding="utf-8")
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
    run = express(topology, layout, times, transfer, drawn[:compiled])
    if run is None:
        run = System(topology, layout, times, transfer).run(drawn[:requests])
    return topology.mode, run
