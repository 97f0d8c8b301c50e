"""A model that fits no single node: stages of prefill and decode side by side, so that KV never crosses nodes."""

from __future__ import annotations

from typing import Any

from dsobserve.terminal import counted, digits
from dsplan.drawing import Panel
from dsplan.errors import DoesNotFit, UnreachableSlo
from dsplan.memory import memory
from dsplan.placement import Placement
from dsplan.planner import Planner
from dsplan.studies.base import Setting, Study, refuse

ALGORITHMS = {"low": "stages side by side", "high": "phases anywhere"}


def run(setting: Setting) -> Study:
    """Algorithm 2 against Algorithm 1, with what each sends between nodes."""
    shape, per_node = setting.shape, setting.devices_per_node
    alone = max(
        (memory(shape, setting.hardware, tp, per_node // tp).kv_tokens for tp in range(1, per_node + 1)
         if per_node % tp == 0 and shape.heads % tp == 0), default=0,
    )  # fmt: skip
    found: dict[str, Placement] = {}
    rows: list[dict[str, Any]] = []
    for number, algorithm in enumerate(ALGORITHMS):
        setting.progress(ALGORITHMS[algorithm], number, len(ALGORITHMS))
        asked = setting.question(algorithm=algorithm, modes=("disaggregated",))
        try:
            found[algorithm] = Planner(asked).run().chosen
        except (UnreachableSlo, DoesNotFit):
            continue
        mean = sum(prompt for _, prompt, _ in asked.workload.requests) / len(asked.workload.requests)
        rows.append(_row(setting, algorithm, found[algorithm], mean))
    if not rows:
        refuse(setting.question(modes=("disaggregated",)))
    bars = {"goodput": [(float(n), row["goodput_per_device"]) for n, row in enumerate(rows)]}
    sent = {"KV": [(float(n), row["kv_gbit_per_s_between_nodes"]) for n, row in enumerate(rows)]}
    names = tuple(ALGORITHMS[row["algorithm"]] for row in rows)
    panels = [
        Panel(f"{setting}", "", "goodput for each device, requests/s", bars, bars=names),
        Panel("KV between nodes at the goodput", "", "Gbit/s", sent, bars=names),
    ]
    return Study(
        "a model larger than a node", _sentences(setting, alone, found, rows), rows, panels if rows else []
    )


def _row(setting: Setting, algorithm: str, one: Placement, mean_prompt: float) -> dict[str, Any]:
    crosses = algorithm == "high" and setting.nodes > 1
    sent = one.goodput.rate * mean_prompt * setting.shape.kv_token_nbytes * 8 / 1e9 if crosses else 0.0
    return {
        "algorithm": algorithm,
        "placement": str(one.spec),
        "nodes_of_an_instance": one.spec.stages,
        "devices": one.spec.devices,
        "goodput_per_device": one.per_device.rate,
        "kv_gbit_per_s_between_nodes": sent,
    }


def _sentences(setting: Setting, alone: int, found: dict[str, Placement], rows: list[dict[str, Any]]) -> list[str]:
    shape, per_node = setting.shape, setting.devices_per_node
    size = f"{shape.name} ({shape.weights_nbytes / 2**30:.0f} GiB) and {per_node} x {setting.device} in a node"
    told = [f"{size}: " + ("it does not fit." if alone == 0 else f"alone it fits, with {alone} tokens of KV.")]
    if "low" not in found:
        return [*told, "No placement with prefill and decode stages side by side meets the objectives."]
    low = found["low"]
    told.append(
        f"Side by side: {low.spec}, each over {counted(low.spec.stages, 'node')}, {digits(low.per_device.rate)} "
        "requests/s a device, no KV between nodes."
    )
    if "high" not in found:
        return [*told, "With the phases anywhere no placement meets the objectives: the paper's point holds."]
    high, sent = found["high"], rows[-1]["kv_gbit_per_s_between_nodes"]
    held = "holds" if low.per_device.rate > high.per_device.rate else "does not hold"
    told.append(
        f"Anywhere: {high.spec}, {digits(high.per_device.rate)} a device, {digits(sent)} Gbit/s of KV between "
        f"nodes. That stages side by side are better on this network {held}."
    )
    return told
