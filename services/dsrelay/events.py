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
from dswire.messages.kv import Chunk, KvChunk, PathInfo, PoolInfo

ROUTER = "router"
WORKER = "worker:"
FETCHER = "fetcher:"
RELAY = "relay:"

# actions


@dataclass(frozen=True, slots=True)
class StoreChunk:
    """Write the raw frame of the :class:`ChunkArrived` at hand into this staging slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send the first ``nbytes`` of a staging slot behind the message; the slot is reused right after it."""

    peer: str
    message: KvChunk
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Complain:
    """A peer broke the protocol, and was stopped from harming anything: log and count it."""

    peer: str
    error: DsError


@dataclass(frozen=True, slots=True)
class SendProof:
    """Answer a probe with so many bytes of anything."""

    peer: str
    nbytes: int


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


@dataclass(frozen=True, slots=True)
class StageKept:
    """Copy a chunk of KV that is kept here into a staging slot; ends with :class:`KeptStaged`."""

    kept: KvHandle
    chunk: Chunk
    slot: int


# events


@dataclass(frozen=True, slots=True)
class KeptCopied:
    """A copy that is to be kept is there, or cannot be made."""

    now: float
    key: KvKey
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class KeptStaged:
    """The chunk is in its slot."""

    now: float
    key: KvKey
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk came from another relay; its bytes wait in the shell."""

    now: float
    peer: str
    key: KvKey
    chunk: Chunk
    #: length of the one raw frame; 0 when there was not exactly one
    nbytes: int
    #: of the fetch that it answers
    number: int = 0


@dataclass(frozen=True, slots=True)
class ProofArrived:
    """The bytes of a probe came from another relay."""

    now: float
    peer: str
    #: length of the one raw frame; 0 when there was not exactly one
    nbytes: int


@dataclass(frozen=True, slots=True)
class PoolProved:
    """An owner's pool was read, or cannot be."""

    now: float
    owner: str
    bytes_per_s: float
    error: ErrorInfo | None


Action: TypeAlias = (
    Send
    | StoreChunk
    | SendChunk
    | SendProof
    | ProvePool
    | PathKnown
    | CopyKept
    | StageKept
    | Complain
    | Ready
    | End
)
Event: TypeAlias = Received | Tick | PeerLost | ChunkArrived | ProofArrived | PoolProved | KeptCopied | KeptStaged
