"""How many times as long as foretold steps take, one by one and in order of time: for the simulator to go through.

A step shows in the ledger of each request that it served: ``prefill_s`` is the same for all prompts of a batch, and
``first_step_s`` is one step of decode. So a load whose requests are known tells the time of single steps, however
long the requests waited for them. The same is done with what the simulator makes of the same arrivals. What it
lacks at each percentile is given to the measured steps of that percentile, until with this chance its steps differ
among each other as the measured ones do. How requests fared against their objectives is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from statistics import median

from dsbench.bootstrap import percentile
from dssim.noise import Course
from dssim.records import Record
from dssim.times import StepTimes

#: times that the simulator is asked: chance that adds to what differs anyway must be larger than what is lacking
ROUNDS = 4
#: decimals of a second to which the times of one step are the same in all ledgers
SAME = 7
#: no step is that much shorter than foretold
LEAST = 0.2

#: by phase
Noise = dict[str, Course]


def find(
    measured: Sequence[Record],
    predict: Callable[[Noise], Sequence[Record]],
    times: StepTimes,
    *,
    apart: bool = True,
) -> Noise:
    """With what chance the steps of ``predict`` are distributed as those of ``measured``.

    ``times``: of the engine alone. ``apart``: whether other instances read prompts than those that decode; where
    the same do, a sequence's first step may be one that reads as well, so the slow moments are those of reading. A
    phase of which either side has no steps is left out.
    """
    phases = {"prefill": partial(read_steps, times=times)} | ({"decode": _decode} if apart else {})
    real = {phase: steps(measured) for phase, steps in phases.items()}
    noise: Noise = {}
    usual: dict[str, float] = {}
    level = 1.0
    for _ in range(ROUNDS):
        simulated, found = predict(noise), {}
        for phase, steps in real.items():
            ours = sorted(value for _, value in phases[phase](simulated))
            if steps and ours:
                least = usual.setdefault(phase, ours[len(ours) // 10])
                found[phase] = _moved(noise.get(phase, []), steps, ours, least)
        if not apart and found:
            level *= median(_tokens_s(measured)) / median(_tokens_s(simulated))
            found["decode"] = [(at_s, factor * level) for at_s, factor in found["prefill"]]
        noise = found
    return noise


def _moved(noise: Course, real: Course, ours: Sequence[float], least: float) -> Course:
    """``noise`` times what the measured steps are of the simulated ones, each at its percentile.

    No step was foretold to be shorter than ``least``: the simulator may not have come by a moment, however slow.
    """
    before = sorted(factor for _, factor in noise) or [1.0] * len(real)
    ranks = sorted(range(len(real)), key=lambda place: real[place][1])
    wanted = []
    for rank, place in enumerate(ranks):
        value = real[place][1]
        factor = before[rank] * value / ours[int((rank + 0.5) / len(ranks) * len(ours))]
        wanted.append(max(min(factor, value / least), LEAST))
    factors = dict(zip(ranks, _rising(wanted), strict=True))
    return [(at_s, factors[place]) for place, (at_s, _) in enumerate(real)]


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest values of which none is below the one before: chance cannot make what differs more alike."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def read_steps(records: Sequence[Record], times: StepTimes) -> Course:
    """Each step that read prompts: its end, and how many times as long it took as by ``times``."""
    return sorted((ended_s, seconds / times.prefill_s(prompts)) for ended_s, seconds, prompts in _batches(records))


def _batches(records: Sequence[Record]) -> Iterator[tuple[float, float, list[int]]]:
    """The end of each step that read prompts, how long it took, and the tokens of those.

    Prompts of one step were read in the same time, and had their first token before another step could have ended.
    """
    known = [(round(one.ledger.prefill_s, SAME), one.at_s + one.ttft_s, one) for one in records if one.ledger]
    for seconds, alike in groupby(sorted(known, key=lambda one: one[:2]), key=lambda one: one[0]):
        prompts: list[int] = []
        ended_s = math.inf
        for _, at_s, one in alike:
            if prompts and at_s - ended_s > seconds / 2:
                yield ended_s, seconds, prompts
                prompts = []
            if not prompts:
                ended_s = at_s
            prompts.append(one.prompt_tokens)
        yield ended_s, seconds, prompts


def _decode(records: Sequence[Record]) -> Course:
    """The end of each sequence's first step, and its seconds."""
    return sorted(
        (one.at_s + one.total_s - one.ledger.decode_s, one.ledger.first_step_s)
        for one in records
        if one.ledger is not None and one.ledger.first_step_s > 0.0
    )


def _tokens_s(records: Sequence[Record]) -> list[float]:
    """The mean step of each sequence, from its second on; 1 where there is none."""
    known = [(one.ledger, one.output_tokens) for one in records if one.ledger is not None and one.output_tokens > 2]
    return [ledger.decode_s / (tokens - 2) for ledger, tokens in known] or [1.0]


def told(noise: Noise) -> str:
    """For people."""
    return ", ".join(
        f"{phase} {'/'.join(f'{percentile(percent)(factors):.2f}' for percent in (10, 50, 90, 99))}"
        for phase, factors in ((phase, [factor for _, factor in steps]) for phase, steps in noise.items())
    )
