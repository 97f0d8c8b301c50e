"""What goes in and out of the relay machine, beside messages; and how it names its peers.

Peers: ``router``, ``worker:NAME`` on the local socket, ``fetcher:NAME`` for relays that fetch from us, and
``relay:NODE`` for the relays that we fetch from. The prefixes keep a worker from posing as anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dskv.handle import KvHandle, KvKey
from dswire.errors import DsError, ErrorInfo
from dswire.links import End, Ready
from dswire.machine import PeerLost, Received, Send, Tick
from dswire.messages.kv import KvProof, PathInfo, PoolInfo

ROUTER = "router"
WORKER = "worker:"
FETCHER = "fetcher:"
RELAY = "relay:"

# actions


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Make a ticket for ``handle``, and answer the fetch ``number`` of ``peer`` with it."""

    peer: str
    handle: KvHandle
    number: int


@dataclass(frozen=True, slots=True)
class CloseStream:
    """The ticket for that handle is void, and its stream, if there is one, ends here."""

    key: KvKey


@dataclass(frozen=True, slots=True)
class OpenProof:
    """Answer a probe with a ticket for some bytes."""

    peer: str


@dataclass(frozen=True, slots=True)
class ProveStream:
    """Read what the ticket is good for from the relay of a node; ends with :class:`StreamProved`."""

    source: str
    proof: KvProof


@dataclass(frozen=True, slots=True)
class Complain:
    """A peer broke the protocol, and was stopped from harming anything: log and count it."""

    peer: str
    error: DsError


@dataclass(frozen=True, slots=True)
class ProvePool:
    """Map an owner's pool and read some of it; ends with :class:`PoolProved`."""

    owner: str
    pool: PoolInfo


@dataclass(frozen=True, slots=True)
class PathKnown:
    """A path was proved, or cannot be used: log it."""

    path: PathInfo


@dataclass(frozen=True, slots=True)
class CopyKept:
    """Copy an owner's blocks into those of ``kept``, which are ours; ends with :class:`KeptCopied`."""

    handle: KvHandle
    kept: KvHandle


# events


@dataclass(frozen=True, slots=True)
class KeptCopied:
    """A copy that is to be kept is there, or cannot be made."""

    now: float
    key: KvKey
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class StreamProved:
    """Bytes were read from another relay, or cannot be."""

    now: float
    source: str
    bytes_per_s: float
    error: ErrorInfo | None


@dataclass(frozen=True, slots=True)
class PoolProved:
    """An owner's pool was read, or cannot be."""

    now: float
    owner: str
    bytes_per_s: float
    error: ErrorInfo | None


Action: TypeAlias = (
    Send
    | OpenStream
    | CloseStream
    | OpenProof
    | ProveStream
    | ProvePool
    | PathKnown
    | CopyKept
    | Complain
    | Ready
    | End
)
Event: TypeAlias = Received | Tick | PeerLost | StreamProved | PoolProved | KeptCopied
