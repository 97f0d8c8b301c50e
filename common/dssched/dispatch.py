"""Which instance reads a prompt, and which one gets a request (DistServe, section 4.3).

Prompts are read by prefill instances (mode ``disaggregated``), by the instances that decode them (``colocated``),
or by those when they are short (``conditional``): then a hand-off would cost more than what it spares.

Prefill: the shortest queue in tokens. Decode: the least loaded, measured in tokens of context held. Ties go to
the instance that was used longest ago, so that an idle system spreads its work.

Decode instances of the node where the KV lies are preferred, as it need not be sent then: one of another node is
taken when it holds fewer tokens by more than ``node_affinity`` times those of the sequence. With an affinity of 0
it is the least loaded anywhere; with a large one, KV leaves a node only where that has no instance with room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """An instance that may be chosen. Ordered by preference: the smallest wins."""

    #: prefill: tokens queued or running there; decode: tokens of context there; and those of the new sequence that
    #: are not kept there already, or that :func:`sending_tokens` tells of
    tokens: int
    #: counter value of the last time it was chosen
    last_used: int
    name: str


def reads_locally(mode: str, tokens: int, threshold_tokens: int) -> bool:
    """Whether the decode instance reads a prompt of which ``tokens`` are not kept there already."""
    return mode == "colocated" or (mode == "conditional" and tokens < threshold_tokens)


def sending_tokens(length: int, kv_node: str, node: str, node_affinity: float) -> int:
    """Tokens that sending the KV of ``length`` tokens from ``kv_node`` is worth: an instance of ``node`` counts as
    fuller by them."""
    return 0 if node == kv_node else round(node_affinity * length)


def pick(candidates: Iterable[Candidate]) -> str | None:
    """Name of the chosen instance, None when there is none."""
    best = min(candidates, default=None)
    return best.name if best else None
