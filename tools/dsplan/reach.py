"""Why no placement has any goodput: which objective cannot be met, and the best that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsplan.errors import UnreachableSlo
from dsplan.search import Parallel

if TYPE_CHECKING:
    from dsplan.question import Question


def best_ttft_s(question: Question, one: Parallel) -> float:
    """TTFT without any queue that the wanted share of requests gets."""
    instance = question.latency.instance(one.tp, one.pp)
    prompts = [prompt for _, prompt, _ in question.workload.requests]
    times = sorted(one.pp * instance.prefill_stage_s(tokens, tokens * tokens, 1) for tokens in prompts)
    return times[min(int(len(times) * question.slo.attainment), len(times) - 1)]


def best_tpot_s(question: Question, one: Parallel) -> float:
    """TPOT of a sequence alone that the wanted share of requests gets."""
    instance = question.latency.instance(one.tp, one.pp)
    long = [(prompt + output // 2) for _, prompt, output in question.workload.requests if output > 1]
    times = sorted(instance.decode_step_s(1, tokens) for tokens in long) or [0.0]
    return times[min(int(len(times) * question.slo.attainment), len(times) - 1)]


def explain(question: Question, allowed: Sequence[Parallel]) -> None:
    """Raise :class:`UnreachableSlo` naming the objective, if either cannot be met at any rate."""
    slo, share = question.slo, f"{question.slo.attainment:.0%} of {question.workload.name}"
    for name, wanted_s, best in (("TTFT", slo.ttft_s, best_ttft_s), ("TPOT", slo.tpot_s, best_tpot_s)):
        seconds, one = min((best(question, one), one) for one in allowed)
        if seconds > wanted_s:
            raise UnreachableSlo(
                f"a {name} of {wanted_s * 1e3:g} ms cannot be had for {share} on {question.device.name} at any "
                f"rate: the best is {seconds * 1e3:.4g} ms, with {one} and no queue",
                remedy=f"allow a {name} above {seconds * 1.2e3:.3g} ms, more devices in a node, or faster ones",
            )
    raise UnreachableSlo(
        f"TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms can each be met for {share}, but no "
        f"placement on {question.devices} devices meets both for the same requests",
        remedy="relax either objective or the attainment, or allow more devices",
    )
