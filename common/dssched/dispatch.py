"""Which instance gets a request (DistServe, section 4.3).

Prefill: the shortest queue in tokens. Decode: the least loaded, measured in tokens of context held. Ties go to
the instance that was used longest ago, so that an idle system spreads its work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """An instance that may be chosen. Ordered by preference: the smallest wins."""

    #: prefill: tokens queued or running there; decode: tokens of context there
    tokens: int
    #: counter value of the last time it was chosen
    last_used: int
    name: str


def pick(candidates: Iterable[Candidate]) -> str | None:
    """Name of the chosen instance, None when there is none."""
    best = min(candidates, default=None)
    return best.name if best else None
