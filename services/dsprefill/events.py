"""What goes in and out of the prefill machine, beside messages and steps."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.messages.kv import Chunk

# actions


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


# events


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
