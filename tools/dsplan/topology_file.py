"""The topology YAML of a placement, as ``dsctl up`` takes it."""

from __future__ import annotations

from typing import Any

import yaml

from dsobserve.terminal import digits
from dsplan import startable
from dsplan.devices import Device
from dsplan.memory import BLOCK_TOKENS, memory
from dsplan.oracles import MAX_BATCH, step_tokens
from dsplan.placement import Group, Placement, Plan, Spec
from dsplan.profile import ProfileLatency
from dsplan.question import Question
from dsplan.shapes import ModelShape

#: affinity by which KV leaves its node only where that has no decode instance with room
BOUND = 1_000_000.0
#: requests that the router takes at least; else as many as decode instances hold, and again as many that wait
LEAST_REQUESTS = 1024


def document(question: Question, spec: Spec) -> dict[str, Any]:
    """The file's content.

    Raises :class:`PlanInput` for what no topology can say.
    """
    per_node = question.devices_per_node
    startable.check(question, spec)
    places = _places(spec, per_node, apart=question.decode_hardware is not None)
    used = {device.partition("/")[0] for group in places.values() for each in group for device in each}
    kind = "cpu" if question.device.name == "cpu" else "cuda"
    return {
        "model": model(question),
        "slo": {
            "ttft_ms": round(question.slo.ttft_s * 1e3, 3),
            "tpot_ms": round(question.slo.tpot_s * 1e3, 3),
            "attainment": question.slo.attainment,
        },
        "mode": spec.mode,
        **({"conditional": {"threshold_tokens": spec.threshold}} if spec.mode == "conditional" else {}),
        "router": {
            "max_requests": max(LEAST_REQUESTS, 2 * spec.decode.replicas * _batch(spec)),
            **({"node_affinity": BOUND} if spec.algorithm == "low" and spec.stages == 1 and len(used) > 1 else {}),
        },
        "nodes": [
            {
                "name": name,
                "host": f"127.0.0.{1 + int(name[1:])}",
                "devices": [f"{kind}:{i}" for i in range(per_node)],
            }
            for name in sorted(used, key=lambda name: int(name[1:]))
        ],
        **_groups(question, spec, places, kind),
    }


def model(question: Question) -> dict[str, Any]:
    """The model; its weights are those of the profile, where there is one: the times are of no others."""
    latency, dtype = question.latency, {4: "float32", 2: "bfloat16"}[question.shape.item_nbytes]
    section = {"path": question.shape.name, "dtype": dtype}
    if isinstance(latency, ProfileLatency) and latency.profile.subject.quantization:
        section["quantization"] = latency.profile.subject.quantization
    return section


def _groups(question: Question, spec: Spec, places: dict[str, list[list[str]]], kind: str) -> dict[str, Any]:
    named = {name: [[_device(d, kind) for d in one] for one in each] for name, each in places.items()}
    found: dict[str, Any] = {}
    if spec.prefill.replicas:
        one = spec.prefill.parallel
        tokens = step_tokens(question, question.latency.instance(one.tp, one.pp))
        group = _group(question.shape, question.device, spec.prefill, named["prefill"])
        found["prefill"] = {**group, "max_batch_tokens": tokens}
    device = question.kinds[spec.kind].device
    group = _group(question.shape, device, spec.decode, named["decode"])
    found["decode"] = {**group, "max_batch": _batch(spec)}
    if spec.budget:
        found["decode"]["max_batch_tokens"] = spec.budget
    return found


def _batch(spec: Spec) -> int:
    """Sequences that a decode instance holds."""
    return MAX_BATCH * spec.decode.parallel.pp


def _device(place: str, kind: str) -> str:
    node, _, number = place.partition("/")
    return f"{node}/{kind}:{number}"


def _group(shape: ModelShape, device: Device, group: Group, place: list[list[str]]) -> dict[str, Any]:
    one = group.parallel
    tokens = memory(shape, device, one.tp, one.pp).kv_tokens
    return {
        "replicas": group.replicas,
        "tp": one.tp,
        "pp": one.pp,
        "place": place,
        "kv": {"blocks": tokens // BLOCK_TOKENS},
    }


def _places(spec: Spec, per_node: int, *, apart: bool) -> dict[str, list[list[str]]]:
    """Each instance on one node, if it is not larger.

    Pairs of the low algorithm stay together; else the largest come first. ``apart``: the phases have nodes of their
    own.
    """
    if spec.mode == "colocated" and spec.decode.parallel.devices > per_node:
        return {"prefill": [], "decode": _stage_by_stage(spec.decode, per_node)}
    if spec.stages > 1:
        return _side_by_side(spec, per_node)
    wanted = [("prefill", spec.prefill), ("decode", spec.decode)]
    if spec.algorithm == "low":
        order = [pair for _ in range(spec.decode.replicas) for pair in wanted]
    else:
        order = [one for one in wanted for _ in range(one[1].replicas)]
        order.sort(key=lambda one: (apart and one[0], -one[1].parallel.devices))
    together = sum(group.parallel.devices for _, group in wanted) if spec.algorithm == "low" else 0
    node, taken = 0, list[tuple[str, int]]()
    found: dict[str, list[list[str]]] = {"prefill": [], "decode": []}
    for role, group in order:
        # decode of a pair has its room on the node of its prefill
        if not together or role == "prefill":
            room = together or group.parallel.devices
            fits = (used + room <= per_node and (not apart or kind == role) for kind, used in taken)
            node = next((n for n, free in enumerate(fits) if free), len(taken))
        if node == len(taken):
            taken.append((role, 0))
        first = taken[node][1]
        found[role].append([f"n{node}/{first + i}" for i in range(group.parallel.devices)])
        taken[node] = taken[node][0], first + group.parallel.devices
    return found


def _stage_by_stage(group: Group, per_node: int) -> list[list[str]]:
    """Each stage on one node."""
    one = group.parallel
    here = per_node // one.tp
    ranks = [
        f"n{stage // here}/{stage % here * one.tp + i}"
        for stage in range(group.replicas * one.pp)
        for i in range(one.tp)
    ]
    return [ranks[first : first + one.devices] for first in range(0, len(ranks), one.devices)]


def _side_by_side(spec: Spec, per_node: int) -> dict[str, list[list[str]]]:
    """As many stages of each instance on every node of its group, whose instances have its devices in turn."""
    found: dict[str, list[list[str]]] = {"prefill": [], "decode": []}
    for island, counts in enumerate(startable.islands(spec, per_node)):
        nodes = range(island * spec.stages, (island + 1) * spec.stages)
        first = 0
        for role, group, count in zip(found, (spec.prefill, spec.decode), counts, strict=True):
            here = group.parallel.devices // spec.stages
            found[role] += [
                [f"n{node}/{at + i}" for node in nodes for i in range(here)]
                for at in range(first, first + count * here, here)
            ]
            first += count * here
    return found


def text(plan: Plan, one: Placement | None = None) -> str:
    """The file."""
    placed = one or plan.chosen
    names = " and ".join(dict.fromkeys(kind.device.name for kind in plan.question.kinds))
    head = (
        f"# Planned for {plan.question.workload.name}: {digits(placed.goodput.rate)} requests/s on "
        f"{placed.spec.devices} devices of {names}.\n"
        "# Hosts are loopback addresses; put real ones in their place.\n"
    )
    return head + dumped(document(plan.question, placed.spec))


def dumped(content: dict[str, Any]) -> str:
    """YAML as people write it."""
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=116)
