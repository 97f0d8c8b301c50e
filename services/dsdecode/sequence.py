"""A sequence on a decode instance, and its life::

    WAITING ──> PULLING ──> RUNNING ──> GONE
       │           │           │
       │           └─> DOOMED <┘        ended while a thread uses its blocks
       └────────> GONE

WAITING holds no blocks: the KV stays with prefill, whose memory is the buffer for bursts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from dskv.handle import KvKey
from dswire.lifecycle import Lifecycle
from dswire.messages.worker import DecodeStages, DecodeWork


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = 0
    PULLING = 1
    RUNNING = 2
    DOOMED = 3
    GONE = 4


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PULLING, Phase.GONE}),
    Phase.PULLING: frozenset({Phase.RUNNING, Phase.DOOMED, Phase.GONE}),
    Phase.RUNNING: frozenset({Phase.DOOMED, Phase.GONE}),
    Phase.DOOMED: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


@dataclass(slots=True)
class Sequence:
    """One sequence; ``blocks`` is empty exactly while WAITING."""

    work: DecodeWork
    life: Lifecycle[Phase]
    #: output so far, the last token being the one whose KV is not there yet
    output_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    #: copies running in threads
    copies: int = 0
    #: part of the step that runs
    in_step: bool = False
    #: when the relay last moved its hand-off on
    heard_at: float = 0.0
    #: the relay must be told when the last copy of a doomed pull has ended
    abort_pull: bool = False
    transfer_wait_s: float = 0.0
    transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    #: the first step here is still to come, or runs
    fresh: bool = True

    @property
    def key(self) -> KvKey:
        """Its handle's key."""
        return self.work.handle.key

    @property
    def position(self) -> int:
        """Place of the last token, which is also the number of tokens whose KV is there."""
        return len(self.work.prompt_ids) + len(self.output_ids) - 1

    def stages(self, first_step_s: float) -> DecodeStages:
        """Where the time up to the first step went."""
        return DecodeStages(self.transfer_wait_s, self.transfer_s, self.decode_queue_s, first_step_s)
