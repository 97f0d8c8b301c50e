"""How much instances that compute at once slow each other down: found under load, for the simulator's ``beside``.

They share caches, memory bandwidth, and cores with router and clients; how much that costs depends on what they do,
so it is not probed with made-up requests. The workload itself runs for a while, at other times than those that are
foretold afterwards, and the factors are those with which the simulator's steps take as long for the same arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from dsbench.noise import read_steps
from dssim.records import Record
from dssim.times import StepTimes
from dswire.errors import Failed

#: of the simulator, at most; and the share by which it may still be off then
ROUNDS = 12
CLOSE = 0.005
#: no two instances slow each other down by more
WORST = 4.0

#: phase -> how many times as long a step takes beside others
Factors = dict[str, float]


def find(measured: Sequence[Record], predict: Callable[[Factors], Sequence[Record]], times: StepTimes) -> Factors:
    """The factors with which ``predict`` of the same arrivals takes as long as was measured.

    ``times``: of the engine alone. None is below 1: company does not make faster. Raises :class:`Failed` when too
    little of the load was answered.
    """
    factors = {"prefill": 1.0, "decode": 1.0}
    for _ in range(ROUNDS):
        ratios = _ratios(measured, predict(factors), times)
        if not ratios:
            raise Failed("nothing of the load was answered", remedy="see the logs of the system")
        found = {phase: _moved(factors[phase], ratios.get(phase, 1.0)) for phase in factors}
        if max(abs(found[phase] - factors[phase]) for phase in factors) < CLOSE:
            break
        factors = found
    return factors


def _moved(factor: float, ratio: float) -> float:
    """A step is not always beside others, and what takes longer has more of its time beside them: half the way."""
    return min(max(factor * math.sqrt(ratio), 1.0), WORST)


def _ratios(measured: Sequence[Record], predicted: Sequence[Record], times: StepTimes) -> Factors:
    """How many times as long each phase took, whatever a long queue did to some.

    By the median step that reads, beside what its prompts take by ``times``, and the median request that decodes.
    """
    other = {one.number: one for one in predicted}
    pairs = [(_token_s(one), _token_s(other[one.number])) for one in measured if one.number in other]
    decoded = [(real, simulated) for real, simulated in pairs if real and simulated]
    found = {}
    if decoded:
        found["decode"] = median(real for real, _ in decoded) / median(simulated for _, simulated in decoded)
    read = [[factor for _, factor in read_steps(side, times)] for side in (measured, predicted)]
    if all(read) and all(map(median, read)):
        found["prefill"] = median(read[0]) / median(read[1])
    return found


def _token_s(one: Record) -> float:
    """One step of its decoding; 0 where there were too few."""
    return (
        one.ledger.decode_s / (one.output_tokens - 2) if one.ledger is not None and one.output_tokens > 2 else 0.0
    )
