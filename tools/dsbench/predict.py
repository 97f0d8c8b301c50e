"""What the simulator says of a topology at a rate, and the rate at which too few requests meet their objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsbench.served import Served, serve_figures
from dssim.profiled import system_of
from dssim.records import Record
from dssim.wish import Wish, make
from dssim.workload import Arrival
from dstopology.resolved import Slo, Topology
from dswire.errors import BadInput

#: requests of a run that looks for the knee
REQUESTS = 200
#: the knee is known to this share, and looked for between these rates
PRECISION = 0.05
LEAST_RATE, MOST_RATE = 0.1, 1000.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Simulates one topology with one profile."""

    topology: Topology
    profile: Path
    slo: Slo

    def records(self, arrivals: Sequence[Arrival]) -> tuple[Record, ...]:
        """What becomes of each request. Raises what the simulator raises."""
        return system_of(self.topology, str(self.profile)).run(arrivals).records

    def served(self, wish: Wish, warmup_s: float) -> Served:
        """Figures of a workload, warm-up excluded."""
        return serve_figures(self.records(make(wish)), self.slo, warmup_s, wish.rate or 0.0, 0.0)

    def attainment(self, wish: Wish) -> float:
        """Share of the requests that meet both objectives."""
        records = self.records(make(wish))
        hits = [one.ttft_s <= self.slo.ttft_s and one.tpot_s <= self.slo.tpot_s for one in records]
        return sum(hits) / len(hits)

    def knee(self, wish: Wish) -> float:
        """The highest rate that attains the objectives' share. Raises :class:`BadInput` where none does."""

        def holds(rate: float) -> bool:
            return self.attainment(replace(wish, rate=rate, requests=REQUESTS)) >= self.slo.attainment

        low = high = 1.0
        while not holds(low):
            if low <= LEAST_RATE:
                raise BadInput(
                    f"{self.topology.path}: the simulator sees fewer than {self.slo.attainment:.0%} meet the "
                    "objectives at any rate",
                    remedy="give looser ones with --goodput, or a workload with shorter prompts",
                )
            low, high = low / 2, low
        while high < MOST_RATE and holds(high):
            low, high = high, high * 2
        while high - low > PRECISION * high:
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low
