"""The topology YAML of a placement, as ``dsctl up`` takes it."""

from __future__ import annotations

from typing import Any

import yaml

from dsplan.errors import PlanInput
from dsplan.latency import saturating_tokens
from dsplan.memory import BLOCK_TOKENS, memory
from dsplan.planner import MAX_BATCH, Group, Placement, Plan


def document(plan: Plan) -> dict[str, Any]:
    """The file's content. Raises :class:`PlanInput` where an instance spans nodes, which no topology can say."""
    question, chosen = plan.question, plan.chosen
    per_node = question.devices_per_node
    if max(chosen.prefill.parallel.devices, chosen.decode.parallel.devices) > per_node:
        raise PlanInput(
            f"an instance of this placement spans nodes of {per_node} devices, a topology has each on one",
            remedy="plan with --nodes 1, or for nodes with more devices",
        )
    places = _places(chosen, per_node)
    prefill = question.latency.instance(chosen.prefill.parallel.tp, chosen.prefill.parallel.pp)
    used = {device.partition("/")[0] for group in places.values() for one in group for device in one}
    kind = "cpu" if question.device.name == "cpu" else "cuda"
    return {
        "model": {
            "path": question.shape.name,
            "dtype": {4: "float32", 2: "bfloat16"}[question.shape.item_nbytes],
        },
        "slo": {
            "ttft_ms": round(question.slo.ttft_s * 1e3, 3),
            "tpot_ms": round(question.slo.tpot_s * 1e3, 3),
            "attainment": question.slo.attainment,
        },
        "mode": "disaggregated",
        "nodes": [
            {
                "name": name,
                "host": f"127.0.0.{1 + int(name[1:])}",
                "devices": [f"{kind}:{i}" for i in range(per_node)],
            }
            for name in sorted(used, key=lambda name: int(name[1:]))
        ],
        "prefill": {
            **_group(plan, chosen.prefill, [[_device(d, kind) for d in one] for one in places["prefill"]]),
            "max_batch_tokens": saturating_tokens(prefill),
        },
        "decode": {
            **_group(plan, chosen.decode, [[_device(d, kind) for d in one] for one in places["decode"]]),
            "max_batch": MAX_BATCH * chosen.decode.parallel.pp,
        },
    }


def _device(place: str, kind: str) -> str:
    node, _, number = place.partition("/")
    return f"{node}/{kind}:{number}"


def _group(plan: Plan, group: Group, place: list[list[str]]) -> dict[str, Any]:
    one = group.parallel
    tokens = memory(plan.question.shape, plan.question.device, one.tp, one.pp).kv_tokens
    return {
        "replicas": group.replicas,
        "tp": one.tp,
        "pp": one.pp,
        "place": place,
        "kv": {"blocks": tokens // BLOCK_TOKENS},
    }


def _places(chosen: Placement, per_node: int) -> dict[str, list[list[str]]]:
    """Each instance on one node. Pairs of the low algorithm stay together; else the largest come first."""
    wanted = [("prefill", chosen.prefill), ("decode", chosen.decode)]
    if chosen.algorithm == "low":
        order = [pair for _ in range(chosen.prefill.replicas) for pair in wanted]
    else:
        order = [one for one in wanted for _ in range(one[1].replicas)]
        order.sort(key=lambda one: -one[1].parallel.devices)
    together = sum(group.parallel.devices for _, group in wanted) if chosen.algorithm == "low" else 0
    taken: list[int] = []
    found: dict[str, list[list[str]]] = {"prefill": [], "decode": []}
    for role, group in order:
        room = together if role == "prefill" and together else group.parallel.devices
        node = next((n for n, used in enumerate(taken) if used + room <= per_node), len(taken))
        if node == len(taken):
            taken.append(0)
        first = taken[node]
        found[role].append([f"n{node}/{first + i}" for i in range(group.parallel.devices)])
        taken[node] += group.parallel.devices
    return found


def text(plan: Plan) -> str:
    """The file."""
    head = (
        f"# Planned for {plan.question.workload.name}: {plan.chosen.goodput.rate:.3g} requests/s on "
        f"{plan.chosen.devices} devices of {plan.question.device.name}.\n"
        "# Hosts are loopback addresses; put real ones in their place.\n"
    )
    return head + yaml.safe_dump(document(plan), sort_keys=False, default_flow_style=None, width=116)
