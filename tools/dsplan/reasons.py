"""The choice in words: which bound bites just above the goodput."""

from __future__ import annotations

from dsplan.planner import Placement, Plan

#: relative difference of goodputs that their precision does not tell apart
EQUAL = 0.03

_WHY = {
    "prefill": "compute: its stages are never idle",
    "decode": "KV memory: the pool or the batch is full, at a pace below the TPOT objective",
}


def reasons(plan: Plan) -> list[str]:
    """Sentences for people."""
    chosen, beyond = plan.chosen, plan.chosen.beyond
    words = [_placement(chosen)]
    if chosen.saturated:
        words.append(
            f"What bites first is {chosen.saturated}: it cannot serve more without end, while both objectives "
            f"still hold at its limit ({_WHY[chosen.saturated]}); the interval has no width: no sample decides it."
        )
    elif beyond.ttft_misses >= beyond.tpot_misses:
        words.append(_prefill_bound(plan))
    elif beyond.transfer_misses * 2 > beyond.tpot_misses:
        words.append(
            "What bites first is the link: 10 % above the goodput most of the requests that miss TPOT would meet "
            "it if the KV transfer took no time."
        )
    elif beyond.kv_waits * 20 > beyond.count:
        words.append(
            f"What bites first is KV memory: 10 % above the goodput {beyond.kv_waits} of {beyond.count} requests "
            "wait for blocks in decode."
        )
    else:
        words.append(
            "What bites first is memory bandwidth in decode: 10 % above the goodput steps over weights and KV take "
            "longer than the TPOT objective, while the pool has room."
        )
    for other in plan.placements:
        if other is not chosen:
            margin = chosen.per_device.rate / other.per_device.rate - 1 if other.per_device.rate else float("inf")
            if abs(margin) < EQUAL:
                words.append(f"Algorithm {_number(other)} finds a placement that is as good.")
                continue
            words.append(
                f"Algorithm {_number(chosen)} is {margin:.0%} ahead of algorithm {_number(other)} "
                f"({other.per_device.rate:.3g} requests/s and device)."
            )
    return words


def _number(one: Placement) -> str:
    return "1 (high affinity)" if one.algorithm == "high" else "2 (low affinity)"


def _placement(one: Placement) -> str:
    near = "KV stays inside the node" if one.algorithm == "low" else "KV may cross the network"
    return (
        f"{one.prefill.replicas} x prefill {one.prefill.parallel} and {one.decode.replicas} x decode "
        f"{one.decode.parallel} on {one.devices} devices, by algorithm {_number(one)}: {near}."
    )


def _prefill_bound(plan: Plan) -> str:
    beyond, workload = plan.chosen.beyond, plan.question.workload
    instance = plan.question.latency.instance(plan.chosen.prefill.parallel.tp, plan.chosen.prefill.parallel.pp)
    mean = sum(prompt for _, prompt, _ in workload.requests) // len(workload.requests)
    alone_s = instance.stages * instance.prefill_stage_s(mean, mean * mean, 1)
    return (
        f"What bites first is compute in prefill: 10 % above the goodput {beyond.ttft_misses} of {beyond.count} "
        f"requests miss TTFT and {beyond.tpot_misses} miss TPOT; the mean prompt of {mean} tokens alone takes "
        f"{alone_s * 1e3:.0f} of {plan.question.slo.ttft_s * 1e3:g} ms, the rest is queueing."
    )
