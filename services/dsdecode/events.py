"""What goes in and out of the decode machine, beside messages and steps."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.kv import PoolInfo, Ticket

# actions


@dataclass(frozen=True, slots=True)
class CopyDirect:
    """Copy all blocks straight from the owner's segment and verify; ends with :class:`CopyEnded`."""

    handle: KvHandle
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyStream:
    """Read all blocks from the relay of the owner's node and verify; ends with :class:`CopyEnded`."""

    handle: KvHandle
    blocks: tuple[int, ...]
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class CutStream:
    """Nobody wants what is read from a stream any more: its :class:`CopyEnded` is to come soon."""

    key: KvKey


@dataclass(frozen=True, slots=True)
class TryOwner:
    """Read some of an owner's pool, or meet it and have it send some; ends with :class:`OwnerTried`."""

    owner: str
    pool: PoolInfo | None
    meeting: str = ""


# events


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """A copy is done; ``error`` when it was not the right KV, or did not come."""

    now: float
    key: KvKey
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class OwnerTried:
    """How fast KV comes from an owner, or why it cannot."""

    now: float
    owner: str
    bytes_per_s: float
    error: ErrorInfo | None = None
