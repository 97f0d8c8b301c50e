"""Prefill and decode together and apart, at equal resources: goodput for each device (the paper's figures 1, 2).

The paper shows each phase alone against both together; that leaves out that the other phase needs devices too. Here
all systems have the same number of devices, and serve the same requests to the same objectives.
"""

from __future__ import annotations

from typing import Any

from dsobserve.terminal import digits
from dsplan.drawing import Panel
from dsplan.errors import DoesNotFit
from dsplan.goodput import LONG, Experience, experience
from dsplan.oracles import Oracles
from dsplan.placement import WHOLE, Group, Spec
from dsplan.planner import Planner
from dsplan.question import Question
from dsplan.studies.base import Setting, Study, held, refuse

#: tokens of a step, chunks of prompts included
CHUNK = 512
#: rates of the curves, as shares of the best system's goodput
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3)


def systems(question: Question) -> dict[str, Spec]:
    """On the devices of the question, the best parallelism of each: colocated with whole prompts, with chunks, and
    apart."""
    planner = Planner(question)
    allowed, devices = sorted(planner.allowed[0]), question.devices
    apart = [
        Spec("low", Group(p, a), Group(d, b))
        for p in allowed
        for d in allowed
        for a in range(1, devices // p.devices + 1)
        if (b := (devices - a * p.devices) // d.devices) >= 1
    ]
    if not apart:
        raise DoesNotFit(
            f"two instances of {question.shape.name} do not fit into {devices} devices",
            remedy="give more --devices-per-node",
        )
    together = {
        budget: [
            Spec("", Group(one, 0), Group(one, devices // one.devices), mode="colocated", budget=budget, kind=0)
            for one in allowed
        ]
        for budget in (WHOLE, CHUNK)
    }
    return {
        "colocated, whole prompts": _best(planner, together[WHOLE]),
        f"colocated, chunks of {CHUNK}": _best(planner, together[CHUNK]),
        "disaggregated": _best(planner, apart),
    }


def _best(planner: Planner, each: list[Spec]) -> Spec:
    """The one with the highest goodput, by falling bounds."""
    oracles, best, rate = planner.oracles, each[0], 0.0
    for spec in sorted(each, key=lambda one: -oracles.cap(one)):
        if oracles.cap(spec) <= rate:
            break
        if rate == 0.0 or oracles.reaches(oracles.units(spec), rate):
            found = oracles.goodput(spec, interval=False).rate
            best, rate = (spec, found) if found > rate else (best, rate)
    return best


def run(setting: Setting) -> Study:
    """Goodput for each device, and the curves."""
    question = setting.question()
    oracles, each = Oracles(question), systems(question)
    goodputs = {name: oracles.goodput(spec) for name, spec in each.items()}
    most = max(one.rate for one in goodputs.values())
    if most == 0.0:
        refuse(question)
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, Experience]]] = {}
    for name, spec in each.items():
        setting.progress(name, len(lines), len(each))
        units, lines[name] = oracles.units(spec), []
        for share in SHARES:
            seen = experience(question.workload, most * share, question.slo, units, LONG)
            rate = most * share / question.devices
            lines[name].append((rate, seen))
            rows.append(
                {
                    "system": name,
                    "instances": str(spec),
                    "devices": spec.devices,
                    "rate_per_device": rate,
                    "attainment": seen.share,
                    "ttft_p90_ms": seen.ttft_s[90] * 1e3,
                    "tpot_p90_ms": seen.tpot_s[90] * 1e3,
                    "goodput_per_device": goodputs[name].rate / question.devices,
                }
            )
    marks = {"90 %": question.slo.attainment}
    axis = "requests/s and device"
    attained = {name: [(x, seen.share) for x, seen in line] for name, line in lines.items()}
    tpot = {name: [(x, seen.tpot_s[90] * 1e3) for x, seen in line] for name, line in lines.items()}
    panels = [
        Panel(f"{setting}: both objectives, equal devices", axis, "share of requests", attained, marks, top=1.02),
        Panel(
            "TPOT, 90th percentile", axis, "ms", tpot, {"objective": setting.tpot_s * 1e3}, top=3e3 * setting.tpot_s
        ),
    ]
    return Study("interference at equal resources", _sentences(question, oracles, each), rows, panels)


def _sentences(question: Question, oracles: Oracles, each: dict[str, Spec]) -> list[str]:
    rates = {name: oracles.goodput(spec, interval=False).rate / question.devices for name, spec in each.items()}
    whole, chunks, apart = rates.values()
    one = each["disaggregated"].prefill.parallel
    alone = {
        "prefill": oracles.prefill_rate(one) / one.devices,
        "decode": oracles.decode_rate(each["disaggregated"].decode.parallel)
        / each["disaggregated"].decode.parallel.devices,
    }
    told = [f"{name} ({each[name]}): {digits(rate)} requests/s a device." for name, rate in rates.items()]
    told.append(
        f"A phase alone looks better than it is: prefill {digits(alone['prefill'])} and decode "
        f"{digits(alone['decode'])} a device, though neither serves a request without the other."
    )
    for name, rate in (("whole prompts", whole), ("chunks", chunks)):
        found = (
            f"{held(apart / rate)}, {apart / rate:.2f} times its goodput" if rate else "holds, that serves nothing"
        )
        told.append(f"That disaggregation serves more at equal resources, against colocation with {name}: {found}.")
    return told
