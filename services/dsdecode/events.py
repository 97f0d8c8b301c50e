"""What goes in and out of the decode machine, beside messages."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.client import Sampling
from dswire.messages.kv import Chunk
from dswire.messages.worker import Logprobs

# actions


@dataclass(frozen=True, slots=True)
class CopyDirect:
    """Copy all blocks straight from the owner's segment and verify; ends with :class:`CopyEnded`."""

    handle: KvHandle
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyChunk:
    """Copy one chunk out of its staging slot, verifying the whole with the last; ends with :class:`CopyEnded`."""

    handle: KvHandle
    blocks: tuple[int, ...]
    chunk: Chunk
    slot: int
    last: bool


@dataclass(frozen=True, slots=True)
class StartSequence:
    """The sequence joins the running batch: make its sampler."""

    key: KvKey
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ForgetSequence:
    """The sequence is gone: drop its sampler and what was received of it."""

    key: KvKey


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One sequence of a step."""

    key: KvKey
    #: the last token, whose KV is not there yet
    token: int
    #: its place in the sequence, from 0
    position: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunDecode:
    """Run one step; ends with :class:`DecodeStepped`."""

    runs: tuple[DecodeRun, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The router knows us."""


@dataclass(frozen=True, slots=True)
class End:
    """We were refused: the process ends with this error."""

    error: ErrorInfo


# events


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """A copy is done. ``chunk`` is None after a direct copy; ``error`` when it was not the right KV."""

    now: float
    key: KvKey
    chunk: Chunk | None
    last: bool
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class NextToken:
    """The next token of one sequence."""

    key: KvKey
    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class DecodeStepped:
    """A step is done; every sequence of it is in ``tokens`` or in ``failed``."""

    now: float
    tokens: tuple[NextToken, ...]
    seconds: float
    failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()
