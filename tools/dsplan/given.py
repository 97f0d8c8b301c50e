"""A topology that somebody has, as a system of the planner's, to be held against its choice."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dsplan.errors import PlanInput
from dsplan.placement import Group, Spec
from dsplan.planner import Planner
from dsplan.search import Parallel
from dstopology.load import load
from dstopology.modelfacts import model_name
from dstopology.resolved import Instance, Topology


def spec_of(topology: Topology) -> Spec:
    """What the topology describes. Raises :class:`PlanInput` where replicas of one phase differ."""
    prefill, decode = _group(topology, "prefill"), _group(topology, "decode")
    if decode is None:
        raise PlanInput(f"{topology.path} has no decode instance", remedy="give it one")
    budget = _same(topology, topology.role("decode"), "max_batch_tokens")
    return Spec(
        "low" if _stays(topology) else "high",
        prefill or Group(decode.parallel, 0),
        decode,
        topology.mode,
        stages=max(len(set(one.nodes)) for one in topology.instances) if topology.relays else 1,
        budget=0 if topology.mode == "disaggregated" else budget,
        threshold=topology.threshold_tokens if topology.mode == "conditional" else 0,
    )


def read(path: Path, planner: Planner) -> Spec:
    """The system of a file. Raises :class:`TopologyError`, and :class:`PlanInput` for one that cannot be judged."""
    topology = load(path)
    spec = spec_of(topology)
    planned, named = planner.question.shape.name, model_name(topology.model.path)
    if planned.lower() not in named.lower():
        planner.notes.append(f"{path} names the model {named}; it is compared as if it were of {planned}")
    decodes = (planner.mixed if spec.mode == "colocated" else planner.allowed)[-1]
    for group, allowed in ((spec.prefill, planner.allowed[0]), (spec.decode, decodes)):
        if group.replicas and group.parallel not in allowed:
            raise PlanInput(
                f"{path}: {group.parallel} cannot hold {planner.question.shape.name} and its longest sequence, "
                "or the latency model has no times of it",
                remedy="compare a topology of the model and devices that are planned for",
            )
    return spec


def _stays(topology: Topology) -> bool:
    """Whether KV hardly ever leaves its node."""
    decoding = {one.node for one in topology.role("decode")}
    bound = topology.router.node_affinity > 0 and all(one.node in decoding for one in topology.role("prefill"))
    return bound or all(owner.node == reader.node for owner, reader in topology.handoffs())


def _group(topology: Topology, role: Literal["prefill", "decode"]) -> Group | None:
    each = topology.role(role)
    if not each:
        return None
    tp, pp = _same(topology, each, "tp"), _same(topology, each, "pp")
    return Group(Parallel(tp, pp), len(each))


def _same(topology: Topology, each: tuple[Instance, ...], name: str) -> int:
    values = {int(getattr(one, name)) for one in each}
    if len(values) > 1:
        raise PlanInput(
            f"{topology.path}: instances of role {each[0].role} differ in {name}",
            remedy="compare a topology whose replicas are alike",
        )
    return values.pop()
