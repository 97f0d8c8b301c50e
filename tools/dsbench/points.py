"""What is measured, and what came out. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    #: median of the rounds, of one whole step
    seconds: float
    #: the least time that the machine as measured allows, divided by ``seconds``
    roofline_fraction: float
    #: of the steps' time, the part that is not spent inside kernels; None where that is not known
    outside_fraction: float | None = None
    loaded: Loaded | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens made or read a second."""
        return self.point.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        return {
            "system": self.system,
            **asdict(self.point),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "roofline_fraction": self.roofline_fraction,
            "outside_fraction": self.outside_fraction,
            **(asdict(self.loaded) if self.loaded else {}),
        }


def points_of(
    dtype: str, threads: int, batches: Sequence[int], contexts: Sequence[int], prefills: Sequence[int]
) -> Iterator[Point]:
    """All settings for one dtype and number of threads."""
    for batch in batches:
        for context in contexts:
            yield Point("decode", dtype, threads, batch, context)
    for length in prefills:
        yield Point("prefill", dtype, threads, 1, length)
