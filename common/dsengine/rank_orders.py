"""What an instance's process and its other ranks tell each other, over the standard streams of the latter.

A frame is its length in four bytes and MessagePack. The first one to a rank is its :class:`Start`, all others are
steps, and what is done with KV beside them; where stages are on several nodes, a :class:`RankMeet` comes before
those. Back come :class:`Report` frames. No torch here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from dsengine.config import EngineConfig
from dsengine.span import Span
from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.ranks import MirrorWay, RankSpan, RankState

#: seconds between two signs of life of a rank that has loaded
BEAT_S = 1.0
#: longest wait, in seconds, for a rank to have loaded its part of the model
LOAD_S = 600.0
#: longest wait of a rank for another, in seconds: for all to have joined, and within a step
PATIENCE_S = 120.0

_LENGTH = struct.Struct("<I")


class Readable(Protocol):
    """A stream of bytes, buffered or not."""

    def read(self, size: int, /) -> bytes | None:
        """At most ``size`` bytes, and none at the end."""
        ...


class Wiring(msgspec.Struct, frozen=True):
    """How a rank talks to other stages, where these are on several nodes."""

    #: address that it listens at, and that at which others reach it
    bind_host: str
    host: str
    #: of all ranks of the instance; empty where nothing is sealed
    secret: bytes


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
    #: the files of all ranks' pools, as those of its node find them; none where they have none
    segments: tuple[str, ...] = ()
    #: with its own those that lie beside it on its node; half-open
    stages: tuple[int, int] = (0, 0)
    #: None where all ranks are on one node
    wiring: Wiring | None = None


class RankMeet(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All ranks of the instance listen to each other now."""

    #: where the rank of the next stage does; "" where there is none
    where: str


class RankStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step."""

    spans: tuple[RankSpan, ...]
    #: rows of which logits are wanted, counted through all spans
    picked: tuple[int, ...]

    @classmethod
    def of(cls, batch: Sequence[Span], picked: Sequence[int]) -> RankStep:
        """Without what only the drawing rank needs to know."""
        spans = tuple(RankSpan(tuple(one.tokens), one.start, tuple(one.blocks)) for one in batch)
        return cls(spans, tuple(picked))

    def batch(self) -> list[Span]:
        """As the engine takes it."""
        return [Span(one.tokens, one.start, one.blocks) for one in self.spans]


class RankCopy(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that go from the pool to its mirror or the other way; its end is reported."""

    blocks: tuple[int, ...]
    way: MirrorWay


class RankPages(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first rank of stages on one node has pages for blocks of all their mirrors; for none, it lets go those of
    ``key``."""

    key: KvKey
    blocks: tuple[int, ...]


class RankSum(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It sums blocks of all these stages; its end is reported."""

    blocks: tuple[int, ...]


class RankPull(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It has the KV of the owner's stages on its node in blocks of all of these stages; its end is reported."""

    handle: KvHandle
    blocks: tuple[int, ...]
    summed: bool


#: what the first rank of stages on one node does with the KV of all of them
StageOrder: TypeAlias = RankPages | RankSum | RankPull


class Report(msgspec.Struct, frozen=True):
    """How far a rank is."""

    #: ``alive`` is said every :data:`BEAT_S` from ``ready`` on, within steps too
    state: RankState
    error: ErrorInfo | None = None
    #: of one that joins: where the stage before finds it, if that is looked for
    where: str = ""
    #: of what was summed or copied
    checksum: int = 0


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
