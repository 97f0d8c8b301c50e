"""A plan as one HTML page: the verdict, the systems, curves and the Pareto front, all in one file.

Curves are of the queueing oracle, by which the search compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dsobserve.terminal import counted, digits
from dsplan import drawing, pareto
from dsplan.drawing import Panel
from dsplan.goodput import LONG, experience
from dsplan.placement import Placement, Plan
from dsplan.reasons import reasons

if TYPE_CHECKING:
    from dsplan.confirm import Confirmation
    from dsplan.planner import Planner

#: rates of a curve, as shares of the goodput
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border-bottom: 1px solid #ccc; padding: .25rem .8rem;
text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums } tr.chosen { background: #e6f4ea }
.verdict { font-size: 1.25rem; font-weight: 600 } svg { max-width: 100%; height: auto }"""

_NUMBER = ' class="n"'


def page(planner: Planner, plan: Plan, runs: Sequence[Confirmation], compared: Placement | None) -> str:
    """The whole page."""
    from dsplan.report import confirmed

    question = plan.question
    names = " and ".join(dict.fromkeys(kind.device.name for kind in question.kinds))
    title = f"{question.shape.name} on {names}, {question.workload.name}"
    told = reasons(plan, compared)
    sources = "; ".join(dict.fromkeys(kind.latency.source for kind in question.kinds))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>TTFT {question.slo.ttft_s * 1e3:g} ms and TPOT {question.slo.tpot_s * 1e3:g} ms, both for "
        f"{question.slo.attainment:.0%} of the requests; "
        f"{counted(question.nodes, 'node')} of {counted(question.devices_per_node, 'device')}.</p>",
        f'<p class="verdict">{escape(told[0])}</p>',
        _list(told[1:] + [confirmed(run) for run in runs]),
        "<h2>Systems</h2>",
        _systems(plan, compared),
        "<h2>Under load</h2>",
        drawing.svg(_curves(planner, plan, compared)),
        "<h2>TTFT, TPOT and devices</h2>",
        _front(planner, plan),
        "<h2>Notes</h2>",
        _list([*plan.notes, f"Times of steps: {sources}.", f"The search took {plan.search_s:.1f} s."]),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """Rows of cells, the chosen ones marked."""
    out = ["<table><tr>", *(f"<th>{escape(one)}</th>" for one in head), "</tr>"]
    for chosen, cells in rows:
        out.append('<tr class="chosen">' if chosen else "<tr>")
        out += [f"<td{_NUMBER if _numeric(cell) else ''}>{escape(cell)}</td>" for cell in cells]
        out.append("</tr>")
    return "".join([*out, "</table>"])


def _numeric(cell: str) -> bool:
    """A number, a share or a range of numbers."""
    return all(part.rstrip("%").replace(".", "", 1).isdigit() for part in cell.split(" to "))


def _systems(plan: Plan, compared: Placement | None) -> str:
    priced = any(one.price for one in plan.placements)
    head = ["mode", "system", "devices", "requests/s", "a device", "95%", "by"] + ["cost of 1M tokens"] * priced
    rows = []
    for one in [*plan.placements, *([compared] if compared else [])]:
        rate, cost = one.per_device, one.cost(plan.question.workload.mean_output)
        cells = [
            "yours: " + one.spec.mode if one is compared else one.spec.mode,
            plan.system(one.spec),
            f"{one.spec.devices}",
            digits(one.goodput.rate),
            digits(rate.rate),
            f"{digits(rate.low)} to {digits(rate.high)}",
            one.by,
        ]
        cells += ["" if cost is None else digits(cost)] * priced
        rows.append((one is plan.chosen, cells))
    return _table(head, rows)


def _curves(planner: Planner, plan: Plan, compared: Placement | None) -> list[Panel]:
    question, lines = plan.question, {}
    seen = {one.spec.mode: one for one in reversed(plan.placements)}
    if compared is not None:
        seen["yours"] = compared
    for name, one in seen.items():
        units, most = planner.oracles.units(one.spec), one.goodput.rate
        lines[name] = [
            (rate / one.spec.devices, experience(question.workload, rate, question.slo, units, LONG))
            for rate in (most * share for share in (SHARES if most else ()))
        ]
    slo, axis = question.slo, "requests/s and device"
    return [
        Panel(
            "attainment of both objectives",
            axis,
            "share of requests",
            {name: [(x, e.share) for x, e in line] for name, line in lines.items()},
            {f"{slo.attainment:.0%}": slo.attainment},
            top=1.02,
        ),
        Panel(
            "90th percentile of TTFT",
            axis,
            "ms",
            {name: [(x, e.ttft_s[90] * 1e3) for x, e in line] for name, line in lines.items()},
            {"objective": slo.ttft_s * 1e3},
            top=slo.ttft_s * 3e3,
        ),
        Panel(
            "90th percentile of TPOT",
            axis,
            "ms",
            {name: [(x, e.tpot_s[90] * 1e3) for x, e in line] for name, line in lines.items()},
            {"objective": slo.tpot_s * 1e3},
            top=slo.tpot_s * 2e3,
        ),
    ]


def _front(planner: Planner, plan: Plan) -> str:
    rate, each = pareto.points(planner.oracles, plan)
    good = sorted((one for one in each if one.best), key=lambda one: one.measures[::-1])
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in good:
        lines.setdefault(counted(one.spec.devices, "device"), []).append((one.ttft_s * 1e3, one.tpot_s * 1e3))
    head = ("system", "devices", "TTFT p90 ms", "TPOT p90 ms", "both objectives")
    rows = [
        (
            one.spec == plan.chosen.spec,
            (
                plan.system(one.spec),
                f"{one.spec.devices}",
                digits(one.ttft_s * 1e3, 4),
                digits(one.tpot_s * 1e3),
                f"{one.share:.1%}",
            ),
        )
        for one in good
    ]
    if not good:
        return "<p>No system was found that serves this rate.</p>"
    if len(each) == 1:
        return f"<p>Only one system was found that serves {digits(rate)} requests/s.</p>{_table(head, rows)}"
    panel = Panel(f"at {digits(rate)} requests/s", "TTFT p90, ms", "TPOT p90, ms", lines, scatter=True)
    about = f"Systems that no other of the {len(each)} looked at beats in all of TTFT, TPOT and devices."
    return f"<p>{about}</p>{drawing.svg([panel])}{_table(head, rows)}"
