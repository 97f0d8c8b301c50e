"""Tensor against pipeline parallelism: prefill by arrival rate (the paper's figure 4), decode (its figure 5).

Prefill: the mean TTFT of Poisson arrivals of equal prompts on equal devices, by the exact FCFS recursion of the
oracle and the modelled times. Decode: the time of a token and the tokens a second of a batch that grows with the
devices of a pipeline and stays the same for TP.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from dsobserve.terminal import digits
from dsplan.drawing import Panel
from dsplan.errors import PlanInput
from dsplan.goodput import make_workload
from dsplan.latency import Instance
from dsplan.queueing import PrefillUnit, serve
from dsplan.studies.base import Setting, Study, crossing

#: tokens of each prompt, and sequences and context of a decode batch, as in the paper
PROMPT, BATCH, CONTEXT = 512, 128, 256
REQUESTS = 4000
#: rates, as shares of what the slower of the two can read
SHARES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92)
DEGREES = (1, 2, 4, 8)


def run(setting: Setting) -> Study:
    """Both phases."""
    degree = _degree(setting)
    latency = setting.latency()
    both = {f"TP {degree}": latency.instance(degree, 1), f"PP {degree}": latency.instance(1, degree)}
    prefill, first = _prefill(setting, both)
    decode, second = _decode(setting)
    panels = [
        Panel(
            f"{setting.shape.name}: prefill of {PROMPT} tokens on {degree} devices",
            "requests/s",
            "mean TTFT, ms",
            {name: [(r["rate"], r["mean_ttft_ms"]) for r in prefill if r["parallelism"] == name] for name in both},
        ),
        _panel("a token", decode, "token_ms", "ms"),
        _panel("throughput", decode, "tokens_per_s", "tokens/s"),
    ]
    empty = {"rate": "", "mean_ttft_ms": "", "devices": "", "token_ms": "", "tokens_per_s": ""}
    rows = [empty | row for row in (*prefill, *decode)]
    return Study("tensor against pipeline parallelism", [*first, *second], rows, panels)


def _degree(setting: Setting) -> int:
    """The least that both TP and PP can be, the model fitting into as many devices."""
    from dsplan.memory import memory

    for degree in (2, 4, 8):
        fits = [memory(setting.shape, setting.hardware, *one).kv_tokens for one in ((degree, 1), (1, degree))]
        known = setting.latency().degrees()
        if min(fits) > PROMPT and (known is None or {1, degree} <= set(known)):
            return degree
    raise PlanInput(
        f"{setting.shape.name} cannot be cut by TP and by PP into the same number of {setting.device}s, with times "
        "known of both",
        remedy="choose a smaller model, or one without a published profile",
    )


def _prefill(setting: Setting, both: dict[str, Instance]) -> tuple[list[dict[str, Any]], list[str]]:
    drawn = make_workload(f"fixed:{PROMPT},1", REQUESTS, setting.seed).requests
    most = min(1 / one.prefill_stage_s(PROMPT, PROMPT**2, 1) for one in both.values())
    curves: dict[str, dict[float, float]] = {name: {} for name in both}
    for number, share in enumerate(SHARES):
        setting.progress("prefill", number, len(SHARES))
        requests = [(at / (most * share), prompt, output) for at, prompt, output in drawn]
        for name, one in both.items():
            # one prompt a batch, as in the paper's analysis
            served = serve(requests, [PrefillUnit(one, PROMPT, 1)], [])
            curves[name][most * share] = mean(served.ttft_s) * 1e3
    rows = [
        {"phase": "prefill", "parallelism": name, "rate": rate, "mean_ttft_ms": ms}
        for name, curve in curves.items()
        for rate, ms in curve.items()
    ]
    (tp, first), (pp, second) = curves.items()
    where, low = crossing(first, second), min(first)
    better = tp if first[low] < second[low] else pp
    if where is None:
        return rows, [
            f"Prefill: {better} has the shorter TTFT at every rate; the crossing of the paper is not there."
        ]
    held = "as in the paper" if better == tp else "the other way round than in the paper"
    worse = pp if better == tp else tp
    return rows, [f"Prefill: {better} is better below {digits(where)} requests/s, {worse} above: {held}."]


def _decode(setting: Setting) -> tuple[list[dict[str, Any]], list[str]]:
    latency, rows = setting.latency(), []
    known = latency.degrees()
    least = min(known) if known is not None else 1
    for degree in DEGREES:
        if setting.shape.heads % degree == 0 and (known is None or degree in known):
            rows.append(
                _token("TP", degree, latency.instance(degree, 1).decode_step_s(BATCH, BATCH * CONTEXT), BATCH)
            )
        if setting.shape.layers % degree == 0:
            batch = BATCH * degree
            rows.append(
                _token("PP", degree, latency.instance(least, degree).decode_step_s(batch, batch * CONTEXT), batch)
            )
    told = []
    for kind, what, key, least_ratio in (
        ("TP", "cuts the time of a token", "token_ms", 1.2),
        ("PP", "scales throughput", "tokens_per_s", 0.5),
    ):
        line = [row for row in rows if row["parallelism"] == kind]
        first, last = line[0], line[-1]
        ratio = first[key] / last[key] if kind == "TP" else last[key] / first[key]
        scale = last["devices"] / first["devices"]
        holds = ratio > (least_ratio if kind == "TP" else least_ratio * scale)
        told.append(
            f"Decode: that {kind} {what} {'holds' if holds else 'does not hold'}: {ratio:.2f} times from "
            f"{first['devices']} to {last['devices']} devices."
        )
    return rows, told


def _token(kind: str, devices: int, seconds: float, batch: int) -> dict[str, Any]:
    return {
        "phase": "decode",
        "parallelism": kind,
        "devices": devices,
        "token_ms": seconds * 1e3,
        "tokens_per_s": batch / seconds,
    }


def _panel(what: str, rows: list[dict[str, Any]], key: str, unit: str) -> Panel:
    lines = {kind: [(r["devices"], r[key]) for r in rows if r["parallelism"] == kind] for kind in ("TP", "PP")}
    return Panel(f"decode: {what}", "ways of parallelism", unit, lines)
