"""What ``dsctl up`` can start, and the best of that, where the best of all is not.

In mode colocated nothing is handed over, and the stages of instances may be on any nodes. Where KV is handed over,
each instance is on one node, or its stages are side by side with those of the other phase: of the same layers, on
the same nodes.
"""

from __future__ import annotations

from dataclasses import replace

from dsobserve.terminal import counted, digits
from dsplan.errors import PlanInput
from dsplan.placement import Plan, Spec
from dsplan.planner import Planner, Progress, silent
from dsplan.question import Question
from dsplan.search import same_layers
from dswire.errors import DsError


def startable(question: Question, spec: Spec) -> bool:
    """Whether a topology can say it."""
    if spec.mode == "colocated":
        return nodes_of(spec, question.devices_per_node) <= question.nodes
    if spec.stages > 1:
        pps = spec.prefill.parallel.pp, spec.decode.parallel.pp
        return (
            same_layers(question.shape.layers, *pps, spec.stages)
            and 0 < len(islands(spec, question.devices_per_node)) * spec.stages <= question.nodes
        )
    return max(one.parallel.devices for one in (spec.prefill, spec.decode)) <= question.devices_per_node


def islands(spec: Spec, per_node: int) -> list[tuple[int, int]]:
    """Replicas of prefill and of decode on each group of as many nodes as there are stages; empty where they do not
    go there. Those that one group does not hold go pair by pair."""
    ahead, behind = spec.prefill.replicas, spec.decode.replicas
    if spec.devices <= spec.stages * per_node:
        return [(ahead, behind)]
    pairs = per_node * spec.stages // (spec.prefill.parallel.devices + spec.decode.parallel.devices)
    if ahead != behind or not pairs:
        return []
    return [(min(pairs, ahead - first),) * 2 for first in range(0, ahead, pairs)]


def nodes_of(spec: Spec, per_node: int) -> int:
    """Nodes that a colocated system takes: an instance is on one where it can be, else every stage is."""
    one = spec.decode.parallel
    if one.devices <= per_node:
        return -(-spec.decode.replicas // (per_node // one.devices))
    return -(-spec.decode.replicas * one.pp // (per_node // one.tp))


def check(question: Question, spec: Spec) -> None:
    """Raise :class:`PlanInput` for a system that is not."""
    if startable(question, spec):
        return
    weights, per_node = question.shape.weights_nbytes, question.devices_per_node
    holds = weights < per_node * min(kind.device.memory_nbytes for kind in question.kinds)
    raise PlanInput(
        "instances of this placement have stages on several nodes, and prefill and decode are not side by side "
        "there or hold other layers, so that KV would have to cross nodes stage by stage: it can be planned and "
        "compared, not started",
        remedy="plan with --startable, among placements that can be started"
        if holds
        else f"its weights take {weights / 2**30:.0f} GiB, more than a node of {per_node} has: plan for nodes with "
        "more devices, or for devices with more memory",
    )


def tell(plan: Plan, progress: Progress = silent, processes: int = 1) -> None:
    """Where the choice is not, search for the best that is, and note it; where that is no worse, choose it.

    It may be better: candidates are compared one by one, and several small instances share a load more evenly.
    """
    if startable(plan.question, plan.chosen.spec):
        return
    try:
        other = Planner(replace(plan.question, startable=True), progress).run(processes)
    except DsError as error:
        plan.notes.append(f"no system that the servers can start: {error.message}")
        return
    one = other.chosen
    if one.worth >= plan.chosen.worth:
        plan.placements.insert(0, one)
        plan.chosen, plan.strict = one, other.strict
        return
    plan.startable = one
    devices = counted(one.spec.devices, "device")
    plan.notes.append(
        "the choice hands KV over between stages on different nodes, which the servers cannot start; the best that "
        f"they can is {one.spec} on {devices}, {digits(one.per_device.rate)} requests/s a device, "
        f"{1 - one.worth / plan.chosen.worth:.0%} less: --startable plans for that"
    )
