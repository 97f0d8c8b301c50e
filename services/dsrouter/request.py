"""A request at the router, its choices, and the life of a choice::

    QUEUED ──> PREFILLING ──> PLACING ──> DECODING ──> DONE
      ^  │         │ └───────────│───────────> │         ^
      │  └─────────┼─────────────┼─────────────┼─────────┘
      └────────────┴─────────────┴─────────────┘           an attempt was lost: next epoch

A choice is one sequence; its output survives a lost attempt, the next one continues it. Where a decode instance
reads the prompt, there is nothing to place. Where a relay may have kept the KV, a lost attempt leads from DECODING
to PLACING again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrouter.ledger import Account
from dssched.prefix import digests
from dswire.lifecycle import Lifecycle
from dswire.messages.client import Sampling, Submit


class Phase(Enum):
    """Where a choice stands."""

    #: at the router, waiting for an instance that reads its prompt
    QUEUED = 0
    #: at such an instance
    PREFILLING = 1
    #: has a token; waiting for its handle or for a decode instance
    PLACING = 2
    #: at a decode instance
    DECODING = 3
    DONE = 4


_ENDS = frozenset({Phase.QUEUED, Phase.DONE})

TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.PREFILLING, Phase.DONE}),
    Phase.PREFILLING: _ENDS | {Phase.PLACING, Phase.DECODING},
    Phase.PLACING: _ENDS | {Phase.DECODING},
    Phase.DECODING: _ENDS | {Phase.PLACING},
    Phase.DONE: frozenset(),
}


class Writer(Protocol):
    """Makes text of tokens, and finds stop strings in it."""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is safe to send now, and whether a stop string was met."""

    def flush(self) -> str:
        """The rest, at the end."""

    def token_text(self, token: int) -> str:
        """Text of a single token, for log-probabilities."""


#: makes the writer of a choice, given how it samples and the prompt that its text continues
MakeWriter: TypeAlias = Callable[[Sampling, Sequence[int]], Writer]


@dataclass(slots=True)
class Choice:
    """One answer of a request."""

    number: int
    sampling: Sampling
    writer: Writer
    life: Lifecycle[Phase]
    account: Account
    key: KvKey
    #: where the prompt was or is prefilled, or the relay that kept its KV; it may hold KV of ours
    prefill: str | None = None
    decode: str | None = None
    handle: KvHandle | None = None
    #: of its KV, that go ahead while the rest of the prompt is read
    parts: list[KvHandle] = field(default_factory=list)
    #: handles of which the decode instance was told
    told: int = 0
    #: a copy that may be kept while it decodes: its key, and the node of the relay
    kept: tuple[KvKey, str] | None = None
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    #: of prompt and output as this attempt reads them, by block size
    digests: dict[int, list[bytes]] = field(default_factory=dict)

    def chain(self, prompt_ids: Sequence[int], block_size: int) -> list[bytes]:
        """The digests of what is to be read, short of the last token: that one is computed at any rate."""
        found = self.digests.get(block_size)
        if found is None:
            tokens = (*prompt_ids, *self.output_ids)
            found = self.digests[block_size] = digests(tokens[:-1], block_size)
        return found

    @property
    def handles(self) -> list[KvHandle]:
        """Of its KV, as far as it can be fetched."""
        return [*self.parts, self.handle] if self.handle is not None else self.parts


@dataclass(slots=True)
class Request:
    """One request, from submission until its end is forgotten."""

    id: str
    #: the machine's name of the client it belongs to
    client: str
    submit: Submit
    arrived: float
    prompt_ids: tuple[int, ...] = ()
    choices: list[Choice] = field(default_factory=list)
    #: all events so far, for a client that reconnects; the number of an event is its place
    events: list[msgspec.Struct] = field(default_factory=list)
    #: how it ended: "finished" or an error's code; "" while it lives
    ended: str = ""

    @property
    def live(self) -> bool:
        """Whether its end is still to come."""
        return not self.ended
