"""How many times as long as foretold steps take, one by one: for the simulator to draw from.

A step shows in the ledger of each request that it served: ``prefill_s`` is the same for all prompts of a batch, and
``first_step_s`` is one step of decode. So a load whose requests are known tells the time of single steps, however
long the requests waited for them. The same is done with what the simulator makes of the same arrivals; what the
measured times are of the simulated ones, percentile by percentile, is left to chance. How requests fared against
their objectives is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from dsbench.bootstrap import percentile
from dssim.records import Record
from dssim.times import StepTimes

#: points of a distribution, at most
POINTS = 200
#: decimals of a second to which the times of one step are the same in all ledgers
SAME = 7
#: no step is that much shorter than foretold
LEAST = 0.2

#: phase -> how many times as long a step takes, each as likely as the others
Noise = dict[str, list[float]]


def factors(measured: Sequence[Record], simulated: Sequence[Record], times: StepTimes) -> Noise:
    """What is to be drawn from; a phase of which either side has no steps is left out."""
    found = {}
    for phase, steps in (("prefill", read_steps), ("decode", _decode)):
        real, ours = sorted(steps(measured, times)), sorted(steps(simulated, times))
        if real and ours:
            found[phase] = [max(a / b, LEAST) for a, b in _pairs(real, ours)]
    return found


def _pairs(real: Sequence[float], ours: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Both at the same percentiles: in the middle of as many equal parts as the shorter has values."""
    count = min(len(real), len(ours), POINTS)
    for part in range(count):
        at = (part + 0.5) / count
        yield real[int(at * len(real))], ours[int(at * len(ours))]


def read_steps(records: Sequence[Record], times: StepTimes) -> list[float]:
    """Each step that read prompts, as a part of what it takes by ``times``."""
    return [seconds / times.prefill_s(prompts) for seconds, prompts in _batches(records)]


def _batches(records: Sequence[Record]) -> Iterator[tuple[float, list[int]]]:
    """How long each step took that read prompts, and the tokens of those.

    Prompts of one step were read in the same time, and had their first token before another step could have ended.
    """
    known = [(round(one.ledger.prefill_s, SAME), one.at_s + one.ttft_s, one) for one in records if one.ledger]
    for seconds, alike in groupby(sorted(known, key=lambda one: one[:2]), key=lambda one: one[0]):
        prompts: list[int] = []
        ended_s = math.inf
        for _, at_s, one in alike:
            if prompts and at_s - ended_s > seconds / 2:
                yield seconds, prompts
                prompts = []
            if not prompts:
                ended_s = at_s
            prompts.append(one.prompt_tokens)
        yield seconds, prompts


def _decode(records: Sequence[Record], times: StepTimes) -> list[float]:
    """Seconds of the first step of each sequence; where reading was that, of each one's mean step."""
    known = [(one, one.ledger) for one in records if one.ledger is not None and one.output_tokens > 2]
    first = [ledger.first_step_s for _, ledger in known if ledger.first_step_s > 0.0]
    return first or [ledger.decode_s / (one.output_tokens - 2) for one, ledger in known]


def told(noise: Noise) -> str:
    """For people."""
    return ", ".join(
        f"{phase} {'/'.join(f'{percentile(percent)(draws):.2f}' for percent in (10, 50, 90, 99))}"
        for phase, draws in noise.items()
    )
