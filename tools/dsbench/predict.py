"""What the simulator says of a topology at a rate, and the rate at which too few requests meet their objectives.

By a profile of the engine alone, and what was found out about the system around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsbench.contention import Factors
from dsbench.noise import Noise
from dsbench.probe import Constants
from dsplan.profile import load as load_profile
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


@dataclass
class Known:
    """What is known of a system, and the profile that tells it to the simulator."""

    #: of the engine alone
    engine: Path
    #: where the whole is written
    path: Path
    constants: Constants
    beside: Factors = field(default_factory=dict)
    noise: Noise = field(default_factory=dict)

    def write(self) -> None:
        """Replace the whole by what is known now."""
        document = load_profile(self.engine)
        document.transfer, document.beside, document.noise = self.constants.transfer, self.beside, self.noise
        for tp, fit in document.fits.items():
            document.fits[tp] = {**fit, "overhead": self.constants.overhead}
        document.save(self.path)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Simulates one topology with one profile."""

    topology: Topology
    profile: Path
    slo: Slo

    def records(self, arrivals: Sequence[Arrival], seed: int = 0) -> tuple[Record, ...]:
        """What becomes of each request; ``seed``: of chance in the times of steps. Raises as the simulator does."""
        return system_of(self.topology, str(self.profile), seed=seed).run(arrivals).records

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
