"""Why no placement has any goodput: which objective cannot be met, and the best that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from dsobserve.terminal import counted, digits
from dsplan.errors import DoesNotFit, UnreachableSlo
from dsplan.search import Parallel

if TYPE_CHECKING:
    from dsplan.question import Question


def best_ttft_s(question: Question, one: Parallel) -> float:
    """TTFT without any queue that the wanted share of requests gets. Chunks of a prompt do not overlap."""
    instance = question.latency.instance(one.tp, one.pp)
    tokens = _wanted([prompt for _, prompt, _ in question.workload.requests], question)
    return one.pp * instance.prefill_stage_s(tokens, tokens * tokens, 1)


def best_tpot_s(question: Question, one: Parallel) -> float:
    """TPOT of a sequence alone that the wanted share of requests gets."""
    instance = question.latency.instance(one.tp, one.pp)
    long = [(prompt + output // 2) for _, prompt, output in question.workload.requests if output > 1]
    return instance.decode_step_s(1, _wanted(long, question)) if long else 0.0


def _wanted(lengths: list[int], question: Question) -> int:
    """The longest that has to meet its objective: more tokens take longer."""
    return sorted(lengths)[min(int(len(lengths) * question.slo.attainment), len(lengths) - 1)]


def bounded(question: Question, allowed: Sequence[Parallel]) -> None:
    """Raise :class:`UnreachableSlo` naming the objective, if either cannot be met at any rate, by any instance."""
    slo, share = question.slo, f"{question.slo.attainment:.0%} of {question.workload.name}"
    for name, wanted_s, best in (("TTFT", slo.ttft_s, best_ttft_s), ("TPOT", slo.tpot_s, best_tpot_s)):
        seconds, one = min((best(question, one), one) for one in allowed)
        if seconds > wanted_s:
            raise UnreachableSlo(
                f"a {name} of {wanted_s * 1e3:g} ms cannot be had for {share} on {question.device.name} at any "
                f"rate: the best is {digits(seconds * 1e3, 4)} ms, with {one} and no queue",
                remedy=f"allow a {name} above {digits(seconds * 1.2e3)} ms, more devices in a node, or faster ones",
            )


def explain(question: Question) -> NoReturn:
    """Raise :class:`UnreachableSlo` for a question whose objectives can be met, each by itself; :class:`DoesNotFit`
    for one whose phases have no device each."""
    slo, share = question.slo, f"{question.slo.attainment:.0%} of {question.workload.name}"
    if question.devices < 2 and "colocated" not in question.modes:
        raise DoesNotFit(
            "one device cannot hold an instance of prefill and one of decode",
            remedy="give more --nodes or --devices-per-node, or plan for --mode colocated",
        )
    if question.nodes > 1 and question.algorithm == "high" and "colocated" not in question.modes:
        _explain_network(question)
    raise UnreachableSlo(
        f"TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms can each be met for {share}, but no "
        f"placement on {counted(question.devices, 'device')} meets both for the same requests",
        remedy="relax either objective or the attainment, or allow more devices",
    )


def _explain_network(question: Question) -> None:
    """KV between nodes comes before the second token, and so is part of TPOT."""
    requests = question.workload.requests
    prompt = sum(one for _, one, _ in requests) / len(requests)
    link = min(kind.device.network_bytes_per_s for kind in question.kinds)
    seconds, tokens = prompt * question.shape.kv_token_nbytes / link, question.workload.mean_output
    if seconds > question.slo.tpot_s * tokens:
        raise UnreachableSlo(
            f"the KV of a mean prompt, {prompt:.0f} tokens, takes {digits(seconds)} s at {digits(link * 8e-9)} "
            f"Gbit/s between nodes: longer than a TPOT of {question.slo.tpot_s * 1e3:g} ms allows for all "
            f"{tokens:.0f} tokens of an answer",
            remedy="use --algorithm low, which keeps KV in its node, or a faster --network",
        )
