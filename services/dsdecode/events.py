"""What goes in and out of the decode machine, beside messages and steps."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.kv import Chunk

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


# events


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """A copy is done. ``chunk`` is None after a direct copy; ``error`` when it was not the right KV."""

    now: float
    key: KvKey
    chunk: Chunk | None
    last: bool
    error: ErrorInfo | None = None
