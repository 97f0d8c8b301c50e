"""What is measured, and what came out. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from dsbench.machine import Machine

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting that every system is measured in."""

    phase: Phase
    dtype: str
    threads: int
    #: sequences; 1 for prefill
    batch: int
    #: decode: tokens that each sequence attends to, the new one included; prefill: tokens of the prompt
    context: int
    #: of drawing; 0 takes the likeliest
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens that one step makes (decode) or reads (prefill)."""
        return self.batch if self.phase == "decode" else self.context


@dataclass(frozen=True, slots=True)
class Loaded:
    """What it took a system to be ready, in its process."""

    #: imports included
    load_seconds: float
    #: memory that it had then, and how much of that is files and shared memory: other processes may have it too
    resident_nbytes: int
    shared_nbytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A point as one system did it."""

    system: str
    point: Point
    #: median of the rounds, of one whole step; None where there is no figure to be believed
    seconds: float | None
    #: as it was in the same rounds, the median of each figure; None where there was none
    machine: Machine | None
    #: the least time that the machine allows, divided by that which was taken, the median of the rounds
    roofline_fraction: float | None = None
    #: of the steps' time, the part that is not spent inside kernels; None where that is not known
    outside_fraction: float | None = None
    loaded: Loaded | None = None
    #: why there are no ``seconds``
    reason: str | None = None
    #: as ``roofline_fraction``, of the kernels' limits one after the other: see :mod:`dsbench.roofline`
    in_turn_fraction: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens made or read a second."""
        return None if self.seconds is None else self.point.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        return {
            "system": self.system,
            **asdict(self.point),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "roofline_fraction": self.roofline_fraction,
            "in_turn_fraction": self.in_turn_fraction,
            "outside_fraction": self.outside_fraction,
            "machine_bytes_per_s": self.machine.bytes_per_s if self.machine else None,
            "machine_flops_per_s": self.machine.flops_per_s if self.machine else None,
            "reason": self.reason,
            **(asdict(self.loaded) if self.loaded else {}),
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured for each dtype and number of threads."""

    batches: Sequence[int]
    contexts: Sequence[int]
    #: lengths of prompts
    prefills: Sequence[int]
    #: of decode steps
    temperatures: Sequence[float] = (0.0,)
    #: where the temperature is above 0
    top_p: float = 1.0


def points_of(dtype: str, threads: int, settings: Settings) -> Iterator[Point]:
    """All points for one dtype and number of threads."""
    for batch, context, temperature in product(settings.batches, settings.contexts, settings.temperatures):
        top_p = settings.top_p if temperature > 0 else 1.0
        yield Point("decode", dtype, threads, batch, context, temperature, top_p)
    for length in settings.prefills:
        yield Point("prefill", dtype, threads, 1, length)
