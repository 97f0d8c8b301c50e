"""The choice, made by the simulator: the servers' own schedulers, message by message.

The search hopes for more than the simulator finds, if anything. So the best by the search is simulated at the
goodput that it hopes for; where too few requests meet their objectives there, a few more runs below find the
simulator's own. That goes on with whatever is the best then, until it has been simulated itself: what is hoped of
the others is no more. The runner-up, the best that does it the other way, together or apart, is found likewise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsobserve.terminal import digits
from dsplan.goodput import LONG, RESIDENCES, WARM_UP, Goodput
from dsplan.latency import Instance as PlannedInstance
from dsplan.latency import Steps
from dsplan.linear import LinearInstance
from dsplan.memory import BLOCK_TOKENS
from dsplan.placement import Placement, Plan, Spec
from dsplan.question import MODES, Question
from dsplan.topology_file import document, dumped
from dssim.records import Run
from dssim.times import StepTimes
from dstopology.resolved import Instance
from dswire.errors import DsError

if TYPE_CHECKING:
    from dsplan.planner import Planner
    from dssim.express.run import Goal


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Joint attainment in the simulator at a rate, with its 95 % interval."""

    mode: str
    requests: int
    rate: float
    attainment: float
    low: float
    high: float


#: halvings of the range between no load and the search's goodput
HALVINGS = 4
#: systems that are simulated at most
MOST_SYSTEMS = 12


def checked(planner: Planner, plan: Plan, requests: int) -> list[Confirmation]:
    """Make the choice the simulator's; its runs at its own goodputs of the choice and of the runner-up.

    What is simulated has the simulator's goodput from then on, and notes tell where that changed the choice.
    ``requests``: of a run on the machines; those of the compiled simulator are as long as those of the search.
    """
    check = _Check(planner, plan, requests)
    first = plan.chosen
    best = check.best(MODES)
    runner_up = check.best(_otherwise(plan, best)) if best is not None else None
    if best is not None and best.spec != first.spec:
        plan.notes.append(_other(first, check.seen.get(first.spec), best))
        plan.strict = planner.oracles.goodput(best.spec, attainment=0.99, interval=False)
    if best is not None:
        plan.chosen = best
    if plan.strict.rate > plan.chosen.goodput.rate:
        own = plan.chosen.goodput.rate
        plan.strict = Goodput(own, own, own)
    for message, refused in check.refused.items():
        plan.notes.append(f"not checked in the simulator, mode {' and '.join(dict.fromkeys(refused))}: {message}")
    plan.placements.sort(key=lambda one: (one is plan.chosen, one.worth), reverse=True)
    runs = [check.seen.get(one.spec) for one in (best, runner_up) if one is not None]
    return [run for run in runs if run is not None]


def _otherwise(plan: Plan, best: Placement) -> set[str]:
    """Modes of the runner-up: those that disaggregate where the best does not, and the other way round."""
    together = {"colocated"}
    others = set(MODES) - together if best.spec.mode in together else together
    known = {one.spec.mode for one in plan.placements}
    return others if others & known else known - {best.spec.mode}


def settled(plan: Plan, one: Placement, requests: int) -> Placement:
    """A system with the simulator's goodput, where the simulator can run it and finds any."""
    try:
        run = agreed(plan, confirmations(plan, requests, one))
    except DsError:
        return one
    return corrected(one, run) if run.attainment >= plan.question.slo.attainment else one


@dataclass(slots=True)
class _Check:
    planner: Planner
    plan: Plan
    requests: int
    #: systems that were simulated, with the run at the simulator's own goodput; None where it cannot run one
    seen: dict[Spec, Confirmation | None] = field(default_factory=dict)
    #: why -> modes
    refused: dict[str, list[str]] = field(default_factory=dict)

    def best(self, modes: Collection[str]) -> Placement | None:
        """The best of these modes by the simulator. What it cannot run is that only where the search chose it."""
        while True:
            rivals = [one for one in self.plan.placements if one.spec.mode in modes and self._counts(one)]
            one = max(rivals, key=lambda one: (self._attains(one.spec), *self.planner.order(one)), default=None)
            if one is None or one.spec in self.seen:
                return one
            self._simulate(one)

    def _counts(self, one: Placement) -> bool:
        if one.spec not in self.seen:
            return len(self.seen) < MOST_SYSTEMS
        return one is self.plan.chosen or self.seen[one.spec] is not None

    def _attains(self, spec: Spec) -> bool:
        run = self.seen.get(spec)
        return run is None or run.attainment >= self.plan.question.slo.attainment

    def _simulate(self, one: Placement) -> None:
        self.planner.progress(f"simulating {one.spec}", len(self.seen), len(self.seen) + 1)
        try:
            runs = confirmations(self.plan, self.requests, one)
        except DsError as error:
            self.seen[one.spec] = None
            self.refused.setdefault(error.message, []).append(one.spec.mode)
            return
        self.seen[one.spec] = run = agreed(self.plan, runs)
        told = corrected(one, run) if self._attains(one.spec) else one
        self.plan.placements = [told if other is one else other for other in self.plan.placements]
        if one is self.plan.chosen:
            self.plan.chosen = told
        if told.spec.mode == "colocated" and len(self.plan.question.kinds) == 1:
            self._more()

    def _more(self) -> None:
        """Of mode colocated the search told its best alone: the next joins where it is hoped to do more."""
        known = {one.spec for one in self.plan.placements}
        together = [one for one in self.plan.placements if one.spec.mode == "colocated"]
        best = max((one.per_device.rate for one in together if self._attains(one.spec)), default=0.0)
        for tried in sorted(self.plan.mixed, key=lambda one: -one.per_device):
            if tried.per_device <= best:
                return
            for one in self.planner.place_colocated(tried, 0):
                if one.spec not in known and one.goodput.rate > 0:
                    self.plan.placements.append(one)
                    return


def corrected(one: Placement, run: Confirmation) -> Placement:
    """With the simulator's goodput, where that is less; the interval holds both."""
    own, hopeful = run.rate, one.goodput
    if own >= hopeful.rate:
        return replace(one, simulated=True)
    return replace(one, goodput=Goodput(own, min(hopeful.low, own), hopeful.high), simulated=True)


def _other(first: Placement, run: Confirmation | None, best: Placement) -> str:
    """The simulator prefers another one."""
    devices = first.spec.devices
    hoped, found = digits(first.per_device.rate), "nowhere enough" if run is None else digits(run.rate / devices)
    return (
        f"the search had put {first.spec} first, with {hoped} requests/s a device; the simulator finds {found} "
        f"there, and {digits(best.per_device.rate)} with the choice"
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
    from dssim.express.run import Goal
    from dssim.statistics import wilson

    question, slo = plan.question, plan.question.slo
    long = len(question.workload.at(rate, RESIDENCES * question.workload.mean_output * slo.tpot_s, LONG))
    first = int(long * WARM_UP)
    goal = Goal(slo.ttft_s, slo.tpot_s, first, int((long - first) * (1 - slo.attainment)))
    mode, run, asked = simulated(question, (one or plan.chosen).spec, rate, requests, long, goal)
    counted = [record for record in run.records if record.number >= asked * WARM_UP]
    hits = sum(record.ttft_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s for record in counted)
    found = wilson(hits, len(counted))
    return Confirmation(mode, len(counted), rate, found.value, found.low, found.high)


def simulated(
    question: Question, spec: Spec, rate: float, requests: int, compiled: int, goal: Goal | None = None
) -> tuple[str, Run, int]:
    """The mode, the run at a rate, and of how many of the question's requests: ``compiled`` if the simulator is,
    and then only until the ``goal`` is out of reach; else ``requests``."""
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
    run = express(topology, layout, times, transfer, drawn[:compiled], goal)
    if run is not None:
        return topology.mode, run, compiled
    return topology.mode, System(topology, layout, times, transfer).run(drawn[:requests]), requests
