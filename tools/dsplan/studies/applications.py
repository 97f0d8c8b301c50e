"""Goodput and SLO-scale curves of the paper's applications (its figures 8 and 9): disaggregated and colocated.

Each mode has its best placement on the devices; curves are of joint attainment over the rate for each device, and
at the better mode's goodput over both objectives scaled alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dsobserve.terminal import digits
from dsplan.drawing import Panel
from dsplan.errors import DoesNotFit, UnreachableSlo
from dsplan.goodput import LONG, Slo, experience
from dsplan.placement import Placement
from dsplan.planner import Planner
from dsplan.question import Question
from dsplan.studies.base import Setting, Study, held

#: of the paper's cluster; its 25 Gbit/s between nodes is the table's for this device
NODES, DEVICES_PER_NODE = 4, 8
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
SCALES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
MODES = ("disaggregated", "colocated")


@dataclass(frozen=True, slots=True)
class Application:
    """A row of the paper's table 1. Seconds."""

    model: str
    workload: str
    ttft_s: float
    tpot_s: float


APPLICATIONS = {
    "chatbot-13b": Application("OPT-13B", "sharegpt", 0.25, 0.1),
    "chatbot-66b": Application("OPT-66B", "sharegpt", 2.5, 0.15),
    "chatbot-175b": Application("OPT-175B", "sharegpt", 4.0, 0.2),
    "code-66b": Application("OPT-66B", "humaneval", 0.125, 0.2),
    "summarization-66b": Application("OPT-66B", "longbench", 15.0, 0.15),
}


def run(setting: Setting, names: tuple[str, ...]) -> Study:
    """Those applications on the setting's devices, whatever its model and objectives."""
    rows: list[dict[str, Any]] = []
    panels: list[Panel] = []
    told: list[str] = []
    for number, name in enumerate(names):
        setting.progress(name, number, len(names))
        one = APPLICATIONS[name]
        each = replace(
            setting,
            model=one.model,
            workload=one.workload,
            ttft_s=one.ttft_s,
            tpot_s=one.tpot_s,
            nodes=NODES,
            devices_per_node=DEVICES_PER_NODE,
        )
        question = each.question()
        best = {mode: found for mode in MODES if (found := _best(question, mode)) is not None}
        if not best:
            told.append(f"{name}: no mode meets the objectives on {setting.device}.")
            continue
        by_rate, by_scale = _curves(question, best)
        rows += _rows(name, best, by_rate, by_scale)
        marks = {"90 %": 0.9}
        axis = "requests/s and device"
        panels.append(Panel(f"{name}: rate", axis, "both objectives", by_rate, marks, top=1.02))
        panels.append(
            Panel(f"{name}: SLO scale", "scale of both objectives", "both objectives", by_scale, marks, top=1.02)
        )
        told.append(_sentence(name, best))
    return Study("goodput and SLO-scale curves", told, rows, panels)


def _best(question: Question, mode: str) -> Placement | None:
    try:
        return Planner(replace(question, modes=(mode,))).run().chosen
    except (UnreachableSlo, DoesNotFit):
        return None


Lines = dict[str, list[tuple[float, float]]]


def _curves(question: Question, best: dict[str, Placement]) -> tuple[Lines, Lines]:
    from dsplan.oracles import Oracles

    oracles, slo = Oracles(question), question.slo
    most = max(one.per_device.rate for one in best.values())
    by_rate: Lines = {}
    by_scale: Lines = {}
    for mode, one in best.items():
        units, devices = oracles.units(one.spec), one.spec.devices
        by_rate[mode] = [
            (most * share, experience(question.workload, most * share * devices, slo, units, LONG).share)
            for share in SHARES
        ]
        by_scale[mode] = [
            (
                scale,
                experience(
                    question.workload,
                    most * 0.9 * devices,
                    Slo(slo.ttft_s * scale, slo.tpot_s * scale),
                    units,
                    LONG,
                ).share,
            )
            for scale in SCALES
        ]
    return by_rate, by_scale


def _rows(name: str, best: dict[str, Placement], by_rate: Lines, by_scale: Lines) -> list[dict[str, Any]]:
    return [
        {
            "application": name,
            "mode": mode,
            "placement": str(one.spec),
            "goodput_per_device": one.per_device.rate,
            "curve": curve,
            "x": x,
            "attainment": y,
        }
        for mode, one in best.items()
        for curve, lines in (("rate_per_device", by_rate), ("slo_scale", by_scale))
        for x, y in lines[mode]
    ]


def _sentence(name: str, best: dict[str, Placement]) -> str:
    if len(best) < len(MODES):
        only = next(iter(best))
        rate = digits(best[only].per_device.rate)
        return f"{name}: only mode {only} meets the objectives, {rate} requests/s a device."
    apart, together = (best[mode].per_device.rate for mode in MODES)
    return (
        f"{name}: disaggregated {digits(apart)}, colocated with chunked prefill {digits(together)} requests/s a "
        f"device: that disaggregation serves more {held(apart / together)} ({apart / together:.2f} times)."
    )
