"""High against low node affinity (the paper's section 4): Algorithms 1 and 2 as the network gets faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsplan.drawing import Panel
from dsplan.errors import DoesNotFit, UnreachableSlo
from dsplan.planner import Planner
from dsplan.studies.base import Setting, Study, crossing, refuse

#: Gbit/s between nodes, of each device
LINKS = (10, 25, 50, 100, 200, 400, 800)
ALGORITHMS = {"high": "algorithm 1 (high affinity)", "low": "algorithm 2 (low affinity)"}


def run(setting: Setting) -> Study:
    """Goodput for each device by both algorithms."""
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[float, float]] = {name: {} for name in ALGORITHMS}
    for number, gbps in enumerate(LINKS):
        setting.progress(f"{gbps} Gbit/s", number, len(LINKS))
        device = replace(setting.hardware, network_bytes_per_s=gbps * 1e9 / 8)
        for algorithm in ALGORITHMS:
            if algorithm == "low" and curves["low"] and setting.nodes == 1:
                continue
            asked = setting.question(device=device, algorithm=algorithm, modes=("disaggregated",))
            try:
                chosen = Planner(asked).run().chosen
            except (UnreachableSlo, DoesNotFit):
                continue
            curves[algorithm][gbps] = chosen.per_device.rate
            rows.append(
                {
                    "gbit_per_s": gbps,
                    "algorithm": algorithm,
                    "placement": str(chosen.spec),
                    "goodput_per_device": chosen.per_device.rate,
                }
            )
    if not rows:
        refuse(setting.question(modes=("disaggregated",)))
    lines = {ALGORITHMS[name]: sorted(curve.items()) for name, curve in curves.items() if curve}
    panel = Panel(f"{setting}", "Gbit/s between nodes", "goodput for each device, requests/s", lines)
    return Study("high against low affinity", [_sentence(curves)], rows, [panel])


def _sentence(curves: dict[str, dict[float, float]]) -> str:
    high, low = curves["high"], curves["low"]
    if not high or not low:
        return "One of the algorithms finds no placement here: there is nothing to compare."
    where, least, most = crossing(high, low), min(high), max(high)
    if where is not None:
        return (
            f"Algorithm 1 overtakes algorithm 2 at about {where:.0f} Gbit/s: below, KV has to stay inside nodes, "
            "as the paper says."
        )
    if high[most] < low[most]:
        return (
            f"Algorithm 2 is ahead at every link up to {most} Gbit/s ({low[most] / high[most]:.2f} times): that a "
            "fast network favours algorithm 1 does not hold here."
        )
    return (
        f"Algorithm 1 is ahead from {least} Gbit/s on ({high[least] / low[least]:.2f} times): even the slowest "
        "link carries this KV."
    )
