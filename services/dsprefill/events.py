"""What goes in and out of the prefill machine, beside messages."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.client import Sampling
from dswire.messages.kv import Chunk
from dswire.messages.worker import Logprobs

# actions


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """One sequence of a step."""

    key: KvKey
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class RunPrefill:
    """Run one step; ends with :class:`PrefillStepped`."""

    runs: tuple[PrefillRun, ...]


@dataclass(frozen=True, slots=True)
class Seal:
    """Checksum the blocks; ends with :class:`Sealed`."""

    key: KvKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageChunk:
    """Copy a chunk into a staging slot of the relay; ends with :class:`Staged`."""

    handle: KvHandle
    chunk: Chunk
    slot: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The router knows us."""


@dataclass(frozen=True, slots=True)
class End:
    """We were refused: the process ends with this error."""

    error: ErrorInfo


# events


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The next token of one sequence."""

    key: KvKey
    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class PrefillStepped:
    """A step is done; every sequence of it is in ``tokens`` or in ``failed``."""

    now: float
    tokens: tuple[FirstToken, ...]
    seconds: float
    failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checksum is there."""

    now: float
    key: KvKey
    checksum: int


@dataclass(frozen=True, slots=True)
class Staged:
    """A chunk lies in its slot."""

    now: float
    key: KvKey
    chunk: Chunk
