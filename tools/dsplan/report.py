"""A plan as JSON and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsobserve.terminal import counted, digits, figures, output
from dsplan.placement import Group, Placement, Plan
from dsplan.planner import ORACLE
from dsplan.reasons import reasons, verdict
from dsplan.search import Mixed, Pair, Parallel, Tried, largest

if TYPE_CHECKING:
    from dsplan.confirm import Confirmation


def data(
    plan: Plan, confirmations: Sequence[Confirmation] = (), compared: Placement | None = None
) -> dict[str, Any]:
    """The plan for programs. Rates are requests a second; intervals are 95 %."""
    question, chosen = plan.question, plan.chosen
    spec, per_device = chosen.spec, chosen.per_device
    return {
        "model": question.shape.name,
        "device": question.device.name,
        "decode_device": question.kinds[-1].device.name,
        "workload": question.workload.name,
        "slo": {
            "ttft_ms": question.slo.ttft_s * 1e3,
            "tpot_ms": question.slo.tpot_s * 1e3,
            "attainment": question.slo.attainment,
        },
        "mode": spec.mode,
        "algorithm": spec.algorithm,
        "prefill": _group(spec.prefill),
        "decode": _group(spec.decode),
        "threshold_tokens": spec.threshold,
        "tokens_per_step": spec.budget,
        "devices": spec.devices,
        "goodput": chosen.goodput.rate,
        "goodput_per_device": per_device.rate,
        "interval": [per_device.low, per_device.high],
        "goodput_per_device_at_99": plan.strict.rate / spec.devices,
        "cost_per_million_tokens": chosen.cost(question.workload.mean_output),
        "verdict": verdict(plan),
        "oracle": ORACLE,
        "latency": [one.latency.source for one in question.kinds],
        "simulated": [asdict(one) for one in confirmations],
        "startable": None if plan.startable is None else _placement(plan, plan.startable),
        "compared": None if compared is None else _placement(plan, compared),
        "placements": [_placement(plan, one) for one in plan.placements],
        "reasons": reasons(plan, compared),
        "notes": plan.notes,
        "search_seconds": plan.search_s,
        "candidates": [_candidate(kind, one) for kind, one in every(plan)],
    }


def every(plan: Plan) -> list[tuple[str, Tried]]:
    """All candidates with the list they are of."""
    found: list[tuple[str, Tried]] = []
    if plan.high is not None:
        found += [("prefill", one) for one in plan.high.tried_prefill]
        found += [("decode", one) for one in plan.high.tried_decode]
    if plan.low is not None:
        found += [("pair", one) for one in plan.low.tried]
    return found + [("colocated", one) for one in plan.mixed]


def best_tried(plan: Plan, count: int) -> list[tuple[str, Tried]]:
    """The best ``count`` of each list."""
    lists: dict[str, list[Tried]] = {}
    for kind, one in every(plan):
        lists.setdefault(kind, []).append(one)
    return [(kind, one) for kind, each in lists.items() for one in largest(each, count)]


def _group(group: Group) -> dict[str, int]:
    return {"tp": group.parallel.tp, "pp": group.parallel.pp, "replicas": group.replicas}


def _placement(plan: Plan, one: Placement) -> dict[str, Any]:
    rate = one.per_device
    return {
        "mode": one.spec.mode,
        "algorithm": one.spec.algorithm,
        "prefill": _group(one.spec.prefill),
        "decode": _group(one.spec.decode),
        "threshold_tokens": one.spec.threshold,
        "tokens_per_step": one.spec.budget,
        "devices": one.spec.devices,
        "goodput": one.goodput.rate,
        "goodput_per_device": rate.rate,
        "interval": [rate.low, rate.high],
        "simulated": one.simulated,
        "cost_per_million_tokens": one.cost(plan.question.workload.mean_output),
    }


def _candidate(kind: str, one: Tried) -> dict[str, Any]:
    rates = {"goodput": one.rate, "goodput_per_device": one.per_device, "only_a_bound": not one.exact}
    match one.what:
        case Parallel(tp, pp):
            return {"kind": kind, "tp": tp, "pp": pp, **rates}
        case Mixed(parallel, budget):
            return {"kind": kind, "tp": parallel.tp, "pp": parallel.pp, "tokens_per_step": budget, **rates}
        case Pair() as pair:
            sides = {"prefill": asdict(pair.whole_prefill), "decode": asdict(pair.whole_decode)}
            return {"kind": kind, "stages": pair.stages, **sides, **rates}


def show(plan: Plan, confirmations: Sequence[Confirmation] = (), compared: Placement | None = None) -> None:
    """Print candidates, the choice, and why."""
    console = output()
    columns = ("for", "parallelism", "devices", "requests/s", "a device")
    table = figures(*columns, words=2, title="best candidates")
    for kind, one in best_tried(plan, 3):
        table.add_row(kind, _words(one.what), str(one.what.devices), digits(one.rate), digits(one.per_device))
    console.print(table)
    console.print()
    console.print(_systems(plan, compared))
    console.print()
    for number, sentence in enumerate(reasons(plan, compared)):
        console.print(sentence, style="bold" if number == 0 else None)
    for run in confirmations:
        console.print(confirmed(run))
    for note in plan.notes:
        console.print(f"note: {note}")
    sources = "; ".join(dict.fromkeys(one.latency.source for one in plan.question.kinds))
    console.print(f"candidates by {ORACLE}; times: {sources}; {plan.search_s:.1f} s of search")


def confirmed(run: Confirmation) -> str:
    """What the simulator says, in words."""
    return (
        f"Simulated with the servers' own schedulers, mode {run.mode}: {run.attainment:.1%} of {run.requests} "
        f"requests meet both objectives at {digits(run.rate)} requests/s "
        f"(95% interval {run.low:.1%} to {run.high:.1%})."
    )


def _systems(plan: Plan, compared: Placement | None) -> Any:
    priced = any(one.price for one in plan.placements)
    columns = ["mode", "system", "devices", "requests/s", "a device", "95%", "by"] + ["cost of 1M tokens"] * priced
    table = figures(*columns, words=2, title="systems")
    rows = [(one, one is plan.chosen, one.spec.mode) for one in plan.placements]
    if compared is not None:
        rows.append((compared, False, "yours"))
    for one, chosen, name in rows:
        rate, cost = one.per_device, one.cost(plan.question.workload.mean_output)
        row = [name, plan.system(one.spec), str(one.spec.devices), digits(one.goodput.rate), digits(rate.rate)]
        row += [f"{digits(rate.low)} to {digits(rate.high)}", one.by]
        if priced:
            row.append("" if cost is None else digits(cost))
        table.add_row(*row, style="bold green" if chosen else None)
    return table


def _words(what: Parallel | Pair | Mixed) -> str:
    if isinstance(what, Pair):
        return f"prefill {what.whole_prefill}, decode {what.whole_decode}, {counted(what.stages, 'node')}"
    return str(what)
