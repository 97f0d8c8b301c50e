"""What a system held before and after many requests, and what of that is not as it has to be. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsbench.footprint import Footprint

#: what a process may have grown between the two looks
ALLOWED_NBYTES = 16 << 20
#: files that may be open besides: a log that is written, a connection that is made anew
ALLOWED_FILES = 2


@dataclass(frozen=True, slots=True)
class Look:
    """An idle system at one moment."""

    #: by name
    processes: Mapping[str, Footprint]
    #: its files in the shared-memory directory
    segments: int
    #: of all processes, since the start of the system
    restarts: int


@dataclass(frozen=True, slots=True)
class Endured:
    """What came out."""

    requests: int
    #: of these, those between the two looks
    counted: int
    #: and those that were cancelled on the way
    left: int
    #: error code -> requests
    failed: Mapping[str, int]
    seconds: float
    #: behind the warm-up, and behind the last request
    warm: Look
    end: Look
    #: for some request, when nothing was asked any more: name of the thing -> how many
    held: Mapping[str, int]

    def pairs(self) -> Iterator[tuple[str, Footprint, Footprint]]:
        """Each process then and now."""
        for name, after in self.end.processes.items():
            yield name, self.warm.processes.get(name, Footprint()), after

    @property
    def failures(self) -> list[str]:
        """What is not as it has to be."""
        found = [f"{count} requests failed with {code}" for code, count in self.failed.items()]
        found += [f"{count} {thing} are held for nobody" for thing, count in self.held.items()]
        if self.end.segments != self.warm.segments:
            found.append(f"shared memory has {self.end.segments} files, and had {self.warm.segments}")
        if self.end.restarts != self.warm.restarts:
            found.append(f"processes died: {self.end.restarts - self.warm.restarts} restarts")
        for name, before, after in self.pairs():
            growth = after.private_nbytes - before.private_nbytes
            if growth > ALLOWED_NBYTES:
                found.append(f"{name} grew by {growth / 2**20:.1f} MiB")
            if after.files > before.files + ALLOWED_FILES:
                found.append(f"{name} has {after.files} files open, and had {before.files}")
            if after.threads > before.threads:
                found.append(f"{name} has {after.threads} threads, and had {before.threads}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "failures": self.failures}
