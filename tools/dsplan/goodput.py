"""Goodput: the highest rate at which enough requests meet both objectives, and how sure that is.

:func:`goodput` bisects over the rate. Requests are drawn once and only their arrivals are stretched, so that every
rate sees the same ones. The interval is of rates at which the attainment's 95 % Wilson interval still holds the
target; it tells of the finite sample only, not of the latency model's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsplan.errors import PlanInput
from dsplan.mixed import MixedUnit, serve_mixed
from dsplan.queueing import DecodeUnit, PrefillUnit, Request, Served, serve

#: relative width at which a bisection stops
PRECISION = 0.02
#: requests of a run at low rates, and those drawn, which high rates use to last long enough
LEAST_REQUESTS, MOST_REQUESTS = 1000, 12_000
#: requests of a file that are enough to plan for
FEWEST_ROWS = 50
#: a run lasts this many times a mean output at the TPOT objective, or the batch of decode would not fill up
RESIDENCES = 4.0
#: times as long as those of candidates are the runs of systems, and of what is drawn of them: queues that grow
#: slowly show late
LONG = 3
#: rates below are taken for zero, and above are not looked at: requests a second
LEAST_RATE, MOST_RATE = 0.005, 20_000.0
#: share of the requests, the first to arrive, that is left out of the count
WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives. A request attains them when it meets both."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests a second, with the 95 % interval. All zero where the objectives are never met."""

    rate: float
    low: float
    high: float


NONE = Goodput(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of ``count`` requests, those that met both objectives and those that missed each."""

    count: int
    hits: int
    ttft_misses: int
    tpot_misses: int
    #: misses of TPOT that a transfer of no time would have avoided
    transfer_misses: int = 0
    #: requests that waited for KV blocks in decode
    kv_waits: int = 0

    @property
    def share(self) -> float:
        """Attainment."""
        return self.hits / self.count


#: a rate -> what became of the requests at it
Attain = Callable[[float], Counts]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with the arrivals of one request a second."""

    name: str
    requests: tuple[Request, ...]

    def at(self, rate: float, least_s: float, times: int = 1) -> list[Request]:
        """The same requests at another rate: :data:`LEAST_REQUESTS`, more if those come within ``least_s``, and
        ``times`` as many."""
        count = max(LEAST_REQUESTS, int(rate * least_s)) * times
        return [(at / rate, prompt, output) for at, prompt, output in self.requests[:count]]

    @property
    def mean_output(self) -> float:
        """Tokens."""
        return sum(output for _, _, output in self.requests) / len(self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(prompt + output for _, prompt, output in self.requests)


def make_workload(
    name: str, count: int = MOST_REQUESTS, seed: int = 0, arrival: str = "poisson", cv: float = 1.0
) -> Workload:
    """A workload by any name that :mod:`dssim.wish` knows, at one request a second. Raises :class:`BadInput`."""
    from dssim.wish import Wish, make

    made = make(Wish(name, 1.0, count, arrival, cv, seed))
    if len(made) < FEWEST_ROWS:
        raise PlanInput(
            f"workload {name} has {len(made)} requests: too few to tell a share of them",
            remedy=f"give {FEWEST_ROWS} or more, or write like:{name} for any number of such lengths",
        )
    return Workload(name, tuple((one.at_s, one.prompt_tokens, one.output_tokens) for one in made))


@dataclass(frozen=True, slots=True)
class Units:
    """The replicas of a system: ``prefill`` and ``decode``, or ``mixed`` with or without ``prefill``."""

    prefill: tuple[PrefillUnit, ...] = ()
    decode: tuple[DecodeUnit, ...] = ()
    mixed: tuple[MixedUnit, ...] = ()
    #: with ``mixed`` and ``prefill``: prompts of fewer tokens are read where they are decoded
    threshold: int = 0

    def serve(self, requests: Sequence[Request]) -> Served:
        """One run of the queueing oracle."""
        if self.mixed:
            return serve_mixed(requests, self.prefill, self.mixed, self.threshold)
        return serve(requests, self.prefill, self.decode)


def counts(workload: Workload, rate: float, slo: Slo, units: Units, times: int = 1) -> Counts:
    """What became of the requests at a rate, in a run ``times`` as long as need be."""
    requests = workload.at(rate, RESIDENCES * workload.mean_output * slo.tpot_s, times)
    served = units.serve(requests)
    first = int(len(requests) * WARM_UP)
    hits = ttft = tpot = transfer = 0
    for number in range(first, len(requests)):
        late = served.ttft_s[number] > slo.ttft_s
        slow = served.tpot_s[number] > slo.tpot_s
        ttft, tpot, hits = ttft + late, tpot + slow, hits + (not late and not slow)
        steps = max(requests[number][2] - 1, 1)
        transfer += slow and served.tpot_s[number] - served.transfer_s[number] / steps <= slo.tpot_s
    return Counts(len(requests) - first, hits, ttft, tpot, transfer, served.kv_waits)


#: percentiles that :func:`experience` tells
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Experience:
    """Percentile -> seconds, and the share that met both objectives."""

    ttft_s: dict[int, float]
    tpot_s: dict[int, float]
    share: float


def experience(workload: Workload, rate: float, slo: Slo, units: Units, times: int = 1) -> Experience:
    """TTFT and TPOT at a rate, in a run ``times`` as long as need be; TPOT of answers with two tokens or more."""
    requests = workload.at(rate, RESIDENCES * workload.mean_output * slo.tpot_s, times)
    served = units.serve(requests)
    first = int(len(requests) * WARM_UP)
    kept = range(first, len(requests))
    hits = sum(served.ttft_s[n] <= slo.ttft_s and served.tpot_s[n] <= slo.tpot_s for n in kept)
    ttft = sorted(served.ttft_s[first:])
    tpot = sorted(served.tpot_s[n] for n in kept if requests[n][2] > 1) or [0.0]
    return Experience(
        {percent: ttft[min(len(ttft) * percent // 100, len(ttft) - 1)] for percent in PERCENTILES},
        {percent: tpot[min(len(tpot) * percent // 100, len(tpot) - 1)] for percent in PERCENTILES},
        hits / len(kept),
    )


def goodput(attain: Attain, target: float, *, most: float = MOST_RATE, interval: bool = True) -> Goodput:
    """Bisect to :data:`PRECISION`, up to ``most``. Without ``interval`` both its ends are the rate itself."""
    from dssim.statistics import wilson

    seen: dict[float, Counts] = {}

    def at(rate: float) -> Counts:
        if rate not in seen:
            seen[rate] = attain(rate)
        return seen[rate]

    def holds(rate: float) -> bool:
        return at(rate).share >= target

    rate = highest(holds, most / 2, most)
    if rate == 0.0 or not interval:
        return Goodput(rate, rate, rate)
    low = highest(lambda r: wilson(at(r).hits, at(r).count).low >= target, rate, most)
    high = highest(lambda r: wilson(at(r).hits, at(r).count).high >= target, rate, most)
    return Goodput(rate, min(low, rate), max(high, rate))


def highest(holds: Callable[[float], bool], guess: float, most: float) -> float:
    """The highest rate that holds, to :data:`PRECISION`; 0 where even :data:`LEAST_RATE` does not."""
    low = high = guess
    while holds(high):
        if high >= most:
            return most
        low, high = high, min(high * 2, most)
    while not holds(low):
        if low <= LEAST_RATE:
            return 0.0
        low, high = max(low / 2, LEAST_RATE), low
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
