"""What goes in and out of the prefill machine, beside messages and steps."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo

# actions


@dataclass(frozen=True, slots=True)
class Seal:
    """Have others see the blocks, and make their checksum; ends with :class:`Sealed`."""

    key: KvKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendKv:
    """Meet ``reader``, and send it the KV; :class:`Sending` tells where, before anything is sent."""

    handle: KvHandle
    reader: str
    number: int


@dataclass(frozen=True, slots=True)
class EndSend:
    """Its reader wants no more of what is sent to it."""

    reader: str


@dataclass(frozen=True, slots=True)
class BeMet:
    """Have ``reader`` try how fast KV goes to it, for the relay ``by``; ends with :class:`Meeting`."""

    reader: str
    by: str


# events


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checksum is there; or, with ``error``, nobody can be shown the blocks."""

    now: float
    key: KvKey
    checksum: int
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Sending:
    """Where a reader is met, or why it cannot be."""

    now: float
    key: KvKey
    number: int
    meeting: str
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a reader is met that tries, or why it cannot be."""

    now: float
    reader: str
    by: str
    meeting: str
    error: ErrorInfo | None = None
