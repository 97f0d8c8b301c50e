"""What a replica can do without end: rates beyond which its queue grows for ever, whatever the objectives.

No goodput is above, which makes them bounds for the search; and a run of finite length cannot be trusted to
show it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsplan.latency import Instance
from dsplan.mixed import LEAST_CHUNK, MixedUnit
from dsplan.queueing import DecodeUnit, PrefillReplica, PrefillUnit, Request


def prefill_rate(unit: PrefillUnit, requests: Sequence[Request]) -> float:
    """Requests a second of a backlog in order of arrival, in steps as always: a stage is never idle."""
    replica = PrefillReplica(unit, stages=[0.0] * unit.instance.stages)
    for number, (_, prompt, _) in enumerate(requests):
        replica.push(0.0, number, prompt)
    replica.advance(float("inf"), [0.0] * len(requests))
    return len(requests) / replica.stages[0]


def decode_rate(unit: DecodeUnit, requests: Sequence[Request]) -> float:
    """Requests a second at the largest batch that KV and ``max_batch`` allow, contexts of the mean over time."""
    steps = sum(output - 1 for _, _, output in requests)
    if steps == 0:
        return float("inf")
    context = sum((output - 1) * (prompt + output / 2) for _, prompt, output in requests) / steps
    most = max(1, min(unit.max_batch, int(unit.kv_tokens / context)))
    sizes = {most} | {1 << power for power in range(most.bit_length())}
    pace = max(batch / unit.instance.decode_step_s(batch, int(batch * context)) for batch in sizes)
    return pace * len(requests) / steps


def steady_rate(unit: MixedUnit, requests: Sequence[Request]) -> float:
    """Requests a second of a colocated replica that reads as many as it ends, at the best batch that KV allows.

    Every step makes a token for ``batch`` sequences, ``batch / (output - 1)`` of which end, and reads as many
    prompts in what is left of its budget.
    """
    count = len(requests)
    prompt = sum(prompt for _, prompt, _ in requests) / count
    squares = sum(prompt * prompt for _, prompt, _ in requests) / count
    steps = sum(output - 1 for _, _, output in requests) / count
    if steps == 0:
        return mixed_rate(unit.instance, requests)
    context = sum((output - 1) * (prompt + output / 2) for _, prompt, output in requests) / (steps * count)
    most = max(1, min(unit.max_batch, int(unit.kv_tokens / context)))
    stages, best = unit.instance.stages, 0.0
    for batch in {most} | {1 << power for power in range(most.bit_length())}:
        room = max(unit.budget - batch / stages, LEAST_CHUNK)
        ended = min(batch / steps, stages * room / prompt)
        stage_s = unit.instance.mixed_stage_s(
            ended * prompt / stages, ended * squares / stages, 1, -(-batch // stages), batch * context / stages
        )
        best = max(best, ended / (stages * stage_s))
    return best


#: requests of the one step of :func:`mixed_rate`
MANY = 64


def mixed_rate(instance: Instance, requests: Sequence[Request]) -> float:
    """Requests a second at which the work of many, reading and making all their tokens, is one step without limits.

    An upper bound for steps of any budget and batch: smaller steps only share less of what is fixed.
    """
    count = len(requests)
    prompt = sum(prompt for _, prompt, _ in requests) / count
    squares = sum(prompt * prompt for _, prompt, _ in requests) / count
    steps = sum(output - 1 for _, _, output in requests) / count
    context = sum((output - 1) * (prompt + output / 2) for _, prompt, output in requests) / count
    many = (MANY * one for one in (prompt, squares, 1, steps, context))
    tokens, squares, finished, batch, held = many
    return MANY / instance.mixed_stage_s(tokens, squares, int(finished), int(batch), held)
