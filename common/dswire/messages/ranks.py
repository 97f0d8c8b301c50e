"""Rank hosts <-> the instance whose ranks they run on other nodes.

``link`` names one connection of one host: what was sent over an earlier one says nothing any more.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dswire.errors import ErrorInfo
from dswire.messages.worker import ModelIdentity

#: ``joining``: about to look for the others; ``ready``: loaded; ``alive``: a sign of life; ``copied``: the end of
#: what was done with KV; ``failed``: why it ends
RankState = Literal["joining", "ready", "alive", "copied", "failed"]

#: from a pool to its mirror, or from there to the pool
MirrorWay = Literal["out", "in"]


class RankSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one sequence that take part in a step."""

    tokens: tuple[int, ...]
    #: how many of the sequence are before them
    start: int
    #: all of the sequence
    blocks: tuple[int, ...]


# host -> instance


class HostHello(msgspec.Struct, frozen=True, tag=True):
    """Asks to run ranks; said anew over each connection."""

    protocol: int
    name: str
    link: str
    model: ModelIdentity
    #: digest of all that the ranks of an instance must have in common
    form: str


class RankReported(msgspec.Struct, frozen=True, tag=True):
    """How far a rank is."""

    link: str
    rank: int
    state: RankState
    where: str = ""
    error: ErrorInfo | None = None
    #: of the KV that was summed or copied
    checksum: int = 0


# instance -> host


class HostStart(msgspec.Struct, frozen=True, tag=True):
    """Start the ranks."""

    link: str
    #: of the KV pool
    blocks: int
    #: of which the ranks make the keys that seal what they send each other; empty where nothing is sealed
    secret: bytes


class HostMeet(msgspec.Struct, frozen=True, tag=True):
    """Where a rank finds the one of the next stage."""

    link: str
    rank: int
    where: str


class HostStep(msgspec.Struct, frozen=True, tag=True):
    """One step, for all ranks of the host: see :class:`dsengine.rank_orders.RankStep`."""

    link: str
    spans: tuple[RankSpan, ...]
    picked: tuple[int, ...]


class HostCopy(msgspec.Struct, frozen=True, tag=True):
    """For all ranks of the host: see :class:`dsengine.rank_orders.RankCopy`."""

    link: str
    blocks: tuple[int, ...]
    way: MirrorWay


class HostPages(msgspec.Struct, frozen=True, tag=True):
    """For a rank: see :class:`dsengine.rank_orders.RankPages`."""

    link: str
    rank: int
    key: KvKey
    blocks: tuple[int, ...]


class HostSum(msgspec.Struct, frozen=True, tag=True):
    """For a rank: see :class:`dsengine.rank_orders.RankSum`."""

    link: str
    rank: int
    blocks: tuple[int, ...]


class HostPull(msgspec.Struct, frozen=True, tag=True):
    """For a rank: see :class:`dsengine.rank_orders.RankPull`."""

    link: str
    rank: int
    handle: KvHandle
    blocks: tuple[int, ...]
    summed: bool


class HostPing(msgspec.Struct, frozen=True, tag=True):
    """Is the connection there? Wants no answer."""


class HostRefused(msgspec.Struct, frozen=True, tag=True):
    """The hello was not welcome; the host ends."""

    error: ErrorInfo


FromHost: TypeAlias = HostHello | RankReported
ToHost: TypeAlias = (
    HostStart | HostMeet | HostStep | HostCopy | HostPages | HostSum | HostPull | HostPing | HostRefused
)
