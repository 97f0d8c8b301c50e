"""What an instance's process and its other ranks tell each other, over the standard streams of the latter.

A frame is its length in four bytes and MessagePack. The first one to a rank is its :class:`Start`, all others are
steps, and copies that are made beside them; back come :class:`Report` frames. No torch here.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, Protocol

import msgspec

from dsengine.config import EngineConfig
from dsengine.span import Span
from dswire.errors import ErrorInfo

#: seconds between two signs of life of a rank that has loaded
BEAT_S = 1.0

_LENGTH = struct.Struct("<I")


class Readable(Protocol):
    """A stream of bytes, buffered or not."""

    def read(self, size: int, /) -> bytes | None:
        """At most ``size`` bytes, and none at the end."""
        ...


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


class RankStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step."""

    spans: list[RankSpan]
    #: rows of which logits are wanted, counted through all spans
    picked: list[int]


class RankCopy(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that go from the pool to its mirror or the other way; its end is reported."""

    blocks: list[int]
    way: Literal["out", "in"]


class Report(msgspec.Struct, frozen=True):
    """How far a rank is."""

    #: ``joining``: about to look for the others; ``ready``: loaded; ``alive``: said every :data:`BEAT_S` from then
    #: on, within steps too; ``copied``: the end of a :class:`RankCopy`; ``failed``: why it ends
    state: Literal["joining", "ready", "alive", "copied", "failed"]
    error: ErrorInfo | None = None


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message."""
    body = msgspec.msgpack.encode(message, enc_hook=str)
    return _LENGTH.pack(len(body)) + body


def read(stream: Readable) -> bytes | None:
    """What the next frame holds; None at the end of the stream."""
    head = _exactly(stream, _LENGTH.size)
    return None if head is None else _exactly(stream, _LENGTH.unpack(head)[0])


def _exactly(stream: Readable, count: int) -> bytes | None:
    """An unbuffered stream gives what is there, which may be less than was asked for."""
    got = b""
    while len(got) < count:
        piece = stream.read(count - len(got))
        if not piece:
            return None
        got += piece
    return got


def start_of(frame: bytes) -> Start:
    """The first frame to a rank."""
    return msgspec.msgpack.decode(frame, type=Start, dec_hook=_made)


def _made(kind: type[Any], value: Any) -> Any:
    """Types that MessagePack has not: paths."""
    return kind(value)
