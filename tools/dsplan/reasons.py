"""The choice in words: the verdict on disaggregation with its margin, and which bound bites above the goodput."""

from __future__ import annotations

from dsobserve.terminal import counted, digits
from dsplan.placement import Placement, Plan

#: relative difference of goodputs that their precision does not tell apart
EQUAL = 0.03

_WHY = {
    "prefill": "compute: its stages are never idle",
    "decode": "KV memory: the pool or the batch is full, at a pace below the TPOT objective",
    "both phases together": "compute and KV memory: steps are as full as their budget and the pool allow",
}


def verdict(plan: Plan) -> str:
    """Whether to disaggregate, and by how much the best system that does it the other way is behind."""
    chosen = plan.chosen
    together = chosen.spec.mode == "colocated"
    room = plan.question.has_room
    rivals = [one for one in plan.placements if room(one.spec) or not room(chosen.spec)]
    rival = next((one for one in rivals if (one.spec.mode == "colocated") is not together), None)
    advice = {
        "disaggregated": "Disaggregate",
        "colocated": "Do not disaggregate: read prompts and decode on the same instances",
        "conditional": "Disaggregate long prompts only",
    }[chosen.spec.mode]
    if rival is None:
        return f"{advice}; no other mode was found to serve this, or none was asked for."
    unit = "for the same money" if chosen.price and rival.price else "a device"
    margin = chosen.worth / rival.worth - 1
    if margin < -EQUAL:
        return f"{advice}, as the simpler of two that are close: {-margin:.0%} behind mode {rival.spec.mode}."
    if margin < EQUAL:
        return f"{advice}, though mode {rival.spec.mode} is as good within what the search tells apart."
    if not apart(plan, rival):
        return f"{advice}: {margin:.0%} more goodput {unit} than mode {rival.spec.mode}, but the intervals overlap."
    return f"{advice}: {margin:.0%} more goodput {unit} than mode {rival.spec.mode}."


def apart(plan: Plan, rival: Placement) -> bool:
    """Whether the interval of the choice lies above that of a rival."""
    chosen = plan.chosen
    scale = chosen.worth / chosen.goodput.rate, rival.worth / rival.goodput.rate
    return chosen.goodput.low * scale[0] > rival.goodput.high * scale[1]


def reasons(plan: Plan, compared: Placement | None = None) -> list[str]:
    """Sentences for people, the verdict first; the last one is of a system of their own."""
    words = [verdict(plan), _placement(plan), _bound(plan)]
    if plan.strict.rate:
        share = plan.strict.rate / plan.chosen.spec.devices
        words.append(f"For 99% instead of {plan.question.slo.attainment:.0%} it serves {digits(share)} a device.")
    else:
        words.append("There is no rate at which 99% of the requests meet both objectives.")
    return words + _algorithms(plan) + ([] if compared is None else [_yours(plan, compared)])


def _yours(plan: Plan, compared: Placement) -> str:
    """A system of somebody's own beside the choice."""
    told = f"Yours, {plan.system(compared.spec)}, serves {digits(compared.per_device.rate)} a device"
    margin = compared.worth / plan.chosen.worth - 1
    if abs(margin) < EQUAL:
        return f"{told}: as good as the choice."
    return f"{told}: {abs(margin):.0%} {'more' if margin > 0 else 'less'} than the choice."


def _algorithms(plan: Plan) -> list[str]:
    """Algorithm 1 beside 2, where both found something."""
    by = {one.spec.algorithm: one.worth for one in plan.placements if one.spec.mode == "disaggregated"}
    if len(by) < 2:
        return []
    margin = max(by.values()) / min(by.values()) - 1
    if margin < EQUAL:
        return ["Of the disaggregated placements those of algorithms 1 and 2 are equally good."]
    first, second = ("1 (high affinity)", "2 (low affinity)")[:: 1 if by["high"] > by["low"] else -1]
    return [f"Of the disaggregated placements that of algorithm {first} is {margin:.0%} ahead of that of {second}."]


def _placement(plan: Plan) -> str:
    spec = plan.chosen.spec
    if spec.mode == "colocated":
        return f"{plan.system(spec)}: {counted(spec.devices, 'device')}, and no KV moves."
    near = "KV stays inside the node" if spec.algorithm == "low" else "KV may cross the network"
    return f"{spec}: {counted(spec.devices, 'device')}, and {near}."


def _bound(plan: Plan) -> str:
    chosen, beyond = plan.chosen, plan.chosen.beyond
    if chosen.saturated:
        told = (
            f"What bites first is {chosen.saturated}: it cannot serve more without end ({_WHY[chosen.saturated]})"
        )
        if chosen.goodput.low < chosen.goodput.high:
            return f"{told}."
        return f"{told}, with both objectives held at its limit; no sample decides it: the interval has no width."
    if beyond.ttft_misses >= beyond.tpot_misses:
        return _prefill_bound(plan)
    if beyond.transfer_misses * 2 > beyond.tpot_misses:
        return (
            "What bites first is the link: 10% above the goodput most of the requests that miss TPOT would meet "
            "it if the KV transfer took no time."
        )
    if beyond.kv_waits * 20 > beyond.count:
        return (
            f"What bites first is KV memory: 10% above the goodput {beyond.kv_waits} of {beyond.count} requests "
            "wait for blocks in decode."
        )
    if chosen.spec.mode == "colocated":
        return "What bites first is TPOT: 10% above the goodput steps with prompts in them take longer than it."
    return (
        "What bites first is memory bandwidth in decode: 10% above the goodput steps over weights and KV take "
        "longer than the TPOT objective, while the pool has room."
    )


def _prefill_bound(plan: Plan) -> str:
    spec, beyond, question = plan.chosen.spec, plan.chosen.beyond, plan.question
    requests = question.workload.requests
    mean = sum(prompt for _, prompt, _ in requests) // len(requests)
    hardware = question.kinds[spec.kind if spec.mode == "colocated" else 0]
    parallel = spec.decode.parallel if spec.mode == "colocated" else spec.prefill.parallel
    instance = hardware.latency.instance(parallel.tp, parallel.pp)
    alone_s = instance.stages * instance.prefill_stage_s(mean, mean * mean, 1)
    return (
        f"What bites first is compute in prefill: 10% above the goodput {beyond.ttft_misses} of {beyond.count} "
        f"requests miss TTFT and {beyond.tpot_misses} miss TPOT; the mean prompt of {mean} tokens alone takes "
        f"{alone_s * 1e3:.0f} of {question.slo.ttft_s * 1e3:g} ms, the rest is queueing."
    )
