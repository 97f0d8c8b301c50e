"""Which instance reads a prompt, and which one gets a request (DistServe, section 4.3).

Prompts are read by prefill instances (mode ``disaggregated``), by the instances that decode them (``colocated``),
or by those when they are short (``conditional``): then a hand-off would cost more than what it spares.

Prefill: the shortest queue in tokens. Decode: the least loaded, measured in tokens of context held. Ties go to
the instance that was used longest ago, so that an idle system spreads its work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """An instance that may be chosen. Ordered by preference: the smallest wins."""

    #: prefill: tokens queued or running there; decode: tokens of context there; and those of the new sequence that
    #: are not kept there already
    tokens: int
    #: counter value of the last time it was chosen
    last_used: int
    name: str


def reads_locally(mode: str, tokens: int, threshold_tokens: int) -> bool:
    """Whether the decode instance reads a prompt of which ``tokens`` are not kept there already."""
    return mode == "colocated" or (mode == "conditional" and tokens < threshold_tokens)


def pick(candidates: Iterable[Candidate]) -> str | None:
    """Name of the chosen instance, None when there is none."""
    best = min(candidates, default=None)
    return best.name if best else None
