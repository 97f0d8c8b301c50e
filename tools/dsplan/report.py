"""A plan as JSON and as tables for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsplan.planner import ORACLE, Group, Placement, Plan, best_tried
from dsplan.reasons import reasons
from dsplan.search import Pair, Parallel, Tried

if TYPE_CHECKING:
    from dsplan.confirm import Confirmation


def data(plan: Plan, confirmation: Confirmation | None = None) -> dict[str, Any]:
    """The plan for programs. Rates are requests a second; intervals are 95 %."""
    chosen, per_device = plan.chosen, plan.chosen.per_device
    return {
        "model": plan.question.shape.name,
        "device": plan.question.device.name,
        "workload": plan.question.workload.name,
        "slo": {
            "ttft_ms": plan.question.slo.ttft_s * 1e3,
            "tpot_ms": plan.question.slo.tpot_s * 1e3,
            "attainment": plan.question.slo.attainment,
        },
        "mode": "disaggregated",
        "algorithm": chosen.algorithm,
        "prefill": _group(chosen.prefill),
        "decode": _group(chosen.decode),
        "devices": chosen.devices,
        "goodput": chosen.goodput.rate,
        "goodput_per_device": per_device.rate,
        "interval": [per_device.low, per_device.high],
        "oracle": ORACLE,
        "latency": plan.question.latency.source,
        "simulated": None if confirmation is None else asdict(confirmation),
        "reasons": reasons(plan),
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
    return found


def _group(group: Group) -> dict[str, int]:
    return {"tp": group.parallel.tp, "pp": group.parallel.pp, "replicas": group.replicas}


def _candidate(kind: str, one: Tried) -> dict[str, Any]:
    rates = {"goodput": one.rate, "goodput_per_device": one.per_device, "only_a_bound": not one.exact}
    if isinstance(one.what, Parallel):
        return {"kind": kind, "tp": one.what.tp, "pp": one.what.pp, **rates}
    sides = {"prefill": asdict(one.what.whole_prefill), "decode": asdict(one.what.whole_decode)}
    return {"kind": kind, "stages": one.what.stages, **sides, **rates}


def show(plan: Plan, confirmation: Confirmation | None) -> None:
    """Print candidates, the choice, and why."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("for", "parallelism", "devices", "requests/s", "per device", title="best candidates")
    for kind, one in best_tried(plan, 5):
        row = (kind, _words(one.what), str(one.what.devices), f"{one.rate:.3g}", f"{one.per_device:.3g}")
        table.add_row(*row)
    console.print(table)
    for placement in plan.placements:
        console.print(_line(placement, chosen=placement is plan.chosen))
    for sentence in reasons(plan):
        console.print(sentence)
    if confirmation is not None:
        console.print(
            f"Simulated with the servers' own schedulers: {confirmation.attainment:.1%} of {confirmation.requests} "
            f"requests meet both objectives at {confirmation.rate:.3g} requests/s "
            f"(95 % interval {confirmation.low:.1%} to {confirmation.high:.1%})."
        )
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(f"goodput by {ORACLE}; times: {plan.question.latency.source}; {plan.search_s:.1f} s of search")


def _words(what: Parallel | Pair) -> str:
    if isinstance(what, Parallel):
        return str(what)
    return f"prefill {what.whole_prefill}, decode {what.whole_decode}, {what.stages} node(s)"


def _line(one: Placement, *, chosen: bool) -> str:
    rate = one.per_device
    mark = "[bold]chosen[/bold]" if chosen else "other"
    return (
        f"{mark}: {one.algorithm}: {one.prefill.replicas} x prefill {one.prefill.parallel} + {one.decode.replicas} "
        f"x decode {one.decode.parallel}: {one.goodput.rate:.3g} requests/s, {rate.rate:.3g} a device "
        f"({rate.low:.3g} to {rate.high:.3g})"
    )
