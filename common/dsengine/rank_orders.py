"""What an instance's process and its other ranks tell each other, over the standard streams of the latter.

A frame is its length in four bytes and MessagePack. The first one to a rank is its :class:`Start`, all others are
steps; back come :class:`Report` frames. No torch here.
"""

from __future__ import annotations

import struct
from typing import IO, Any, Literal

import msgspec

from dsengine.config import EngineConfig
from dsengine.span import Span
from dswire.errors import ErrorInfo

_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True):
    """What a rank is."""

    #: of the instance
    name: str
    tp: int
    pp: int
    rank: int
    #: a file by which the ranks find each other
    rendezvous: str
    config: EngineConfig


class RankSpan(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`~dsengine.span.Span` as it travels."""

    tokens: list[int]
    start: int
    blocks: list[int]

    @classmethod
    def of(cls, span: Span) -> RankSpan:
        """Without what only the drawing rank needs to know."""
        return cls(list(span.tokens), span.start, list(span.blocks))

    def span(self) -> Span:
        """As the engine takes it."""
        return Span(self.tokens, self.start, self.blocks)


class RankStep(msgspec.Struct, frozen=True, array_like=True):
    """One step."""

    spans: list[RankSpan]
    #: rows of which logits are wanted, counted through all spans
    picked: list[int]


class Report(msgspec.Struct, frozen=True):
    """How far a rank is."""

    #: ``joining``: about to look for the others; ``ready``: loaded; ``failed``: why it ends
    state: Literal["joining", "ready", "failed"]
    error: ErrorInfo | None = None


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message."""
    body = msgspec.msgpack.encode(message, enc_hook=str)
    return _LENGTH.pack(len(body)) + body


def read(stream: IO[bytes]) -> bytes | None:
    """What the next frame holds; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def start_of(frame: bytes) -> Start:
    """The first frame to a rank."""
    return msgspec.msgpack.decode(frame, type=Start, dec_hook=_made)


def _made(kind: type[Any], value: Any) -> Any:
    """Types that MessagePack has not: paths."""
    return kind(value)
