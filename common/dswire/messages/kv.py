"""Prefill, decode <-> the relay of their node, and relay <-> relay.

Same host: the decode instance copies straight from the owner's mapped pool; the relay only grants and ends it. The
copy need not wait for the grant: a checksum that fits proves it; where it does not, it is made again once granted.
Else the blocks go in chunks: owner -> its relay's staging slot -> TCP -> the other relay's slot -> decode's
pool. A chunk is ``count`` whole blocks beginning with the ``first`` of the handle's list, one slot at most.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import KvShard
from dswire.errors import ErrorInfo
from dswire.messages.worker import HelloWanted


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A run of a handle's blocks."""

    #: from 0, in order
    index: int
    #: position of its first block in ``KvHandle.blocks``
    first: int
    #: whole blocks
    count: int


class PoolInfo(msgspec.Struct, frozen=True):
    """Where the KV of an owner lies."""

    layout: KvLayout
    shards: tuple[KvShard, ...]
    #: in each of the shards
    blocks: int


# worker -> its relay


class KvHello(msgspec.Struct, frozen=True, tag=True):
    """Asks to be registered; a relay that was restarted gets the live offers again after it."""

    protocol: int
    name: str
    incarnation: str
    #: of those that offer KV: the relay proves that it can be read
    pool: PoolInfo | None = None


class KvPong(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`KvPing`."""


class KvOffer(msgspec.Struct, frozen=True, tag=True):
    """Prefill: this KV is ready; the blocks stay until ``KvRelease``."""

    handle: KvHandle
    #: an offer that was known to another relay, or before a silence: what it has left unless somebody wants it
    lease_s: float | None = None


class KvWithdraw(msgspec.Struct, frozen=True, tag=True):
    """Prefill: the sequence was aborted; release it as soon as nobody reads the blocks. Answer: ``KvCancelled``."""

    key: KvKey


class KvHeld(msgspec.Struct, frozen=True, tag=True):
    """Prefill: is this offer still known? Where it is not, ``KvRelease`` was lost, and comes again."""

    key: KvKey


class KvStaged(msgspec.Struct, frozen=True, tag=True):
    """Prefill: the chunk is in the slot."""

    key: KvKey
    chunk: Chunk


class KvPull(msgspec.Struct, frozen=True, tag=True):
    """Decode: blocks are reserved, bring the KV."""

    handle: KvHandle


class KvTaken(msgspec.Struct, frozen=True, tag=True):
    """Decode: the chunk is in the pool, the slot is free."""

    key: KvKey
    chunk: Chunk


class KvPulled(msgspec.Struct, frozen=True, tag=True):
    """Decode: all is there and verified; or, with ``error``, is not."""

    key: KvKey
    error: ErrorInfo | None = None


class KvAgain(msgspec.Struct, frozen=True, tag=True):
    """Decode: all has come and the checksum is wrong; bring it once more, from the source."""

    key: KvKey


class KvAbort(msgspec.Struct, frozen=True, tag=True):
    """Decode: the sequence was aborted; nothing of it is read or written here any more. Answer: ``KvCancelled``."""

    key: KvKey


class KvList(msgspec.Struct, frozen=True, tag=True):
    """Anybody who may connect: what is held here? Answer: :class:`KvListing`."""


class KvExtend(msgspec.Struct, frozen=True, tag=True):
    """Decode, and relay -> owner's relay: these handles are still wanted; their leases begin anew."""

    #: (handle, node of its owner)
    wanted: tuple[tuple[KvKey, str], ...]


# relay -> worker


class KvWelcome(msgspec.Struct, frozen=True, tag=True):
    """Registered. The staging slots are for chunks only."""

    relay: str
    incarnation: str
    lease_s: float
    staging: str
    slots: int
    slot_nbytes: int
    #: KV is summed where it is made and where it arrives
    verify: bool = True
    #: KV that is offered on this node is always granted, never staged
    direct: bool = False

    @property
    def early(self) -> bool:
        """Whether KV of this node may be copied before the grant comes."""
        return self.direct and self.verify


class KvRefused(msgspec.Struct, frozen=True, tag=True):
    """Not registered."""

    error: ErrorInfo


class KvPing(msgspec.Struct, frozen=True, tag=True):
    """Every second to each registered worker."""


class KvRelease(msgspec.Struct, frozen=True, tag=True):
    """To the owner: the blocks are free.

    ``reason``: "pulled", "withdrawn", "aborted", "expired" or "lost".
    """

    key: KvKey
    reason: str


class KvCancelled(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`KvWithdraw` and :class:`KvAbort`: what became of the handle.

    ``result``: "freed" (nothing of it is held here), "in_flight_quarantined" (somebody still reads the blocks;
    ``KvRelease`` follows when that ends, at the latest one lease from now) or "unknown" (it had ended before).
    """

    key: KvKey
    result: str


class HandleInfo(msgspec.Struct, frozen=True):
    """One live handle, as its owner's relay sees it."""

    key: KvKey
    owner: str
    #: "" while nobody reads it
    reader: str
    #: "ready", "pulling" or "quarantined"; "kept" for a copy that nobody was offered
    state: str
    nbytes: int
    tokens: int
    #: since it was offered
    age_s: float
    #: until its lease, or its quarantine, is over; a kept copy has a lease from the router
    lease_left_s: float


class PathInfo(msgspec.Struct, frozen=True):
    """How KV comes to a node from one of its sources."""

    #: an owner of the node, or the node of another relay
    source: str
    #: "shm" or "tcp"
    transport: str
    #: as a small transfer at start-up had it; None while none has come to its end
    bytes_per_s: float | None = None
    #: why a better path cannot be used, or this one cannot; "" where all is well
    reason: str = ""


class KvListing(msgspec.Struct, frozen=True, tag=True):
    """What a relay holds; the oldest handles first."""

    relay: str
    node: str
    handles: tuple[HandleInfo, ...]
    #: handles beyond those listed
    left_off: int
    #: staging slots in use, and all of them
    slots_held: int
    slots: int
    paths: tuple[PathInfo, ...] = ()


class KvStage(msgspec.Struct, frozen=True, tag=True):
    """To the owner: copy this chunk into that staging slot."""

    key: KvKey
    chunk: Chunk
    slot: int


class KvGrant(msgspec.Struct, frozen=True, tag=True):
    """To decode: copy straight from the owner's segment."""

    key: KvKey


class KvChunkReady(msgspec.Struct, frozen=True, tag=True):
    """To decode: the chunk is in that staging slot."""

    key: KvKey
    chunk: Chunk
    slot: int


class KvFailed(msgspec.Struct, frozen=True, tag=True):
    """To decode: the pull has ended without the KV."""

    key: KvKey
    error: ErrorInfo


# fetching relay -> owner's relay


class RelayHello(msgspec.Struct, frozen=True, tag=True):
    """First message of a connection between relays."""

    protocol: int
    name: str
    incarnation: str


class KvFetch(msgspec.Struct, frozen=True, tag=True):
    """Send this handle's chunks, ``credits`` of them for now."""

    key: KvKey
    credits: int
    #: largest chunk, in bytes, that the fetching side takes
    slot_nbytes: int
    #: all have come once, and were not what they should be
    again: bool = False
    #: of the fetching side's fetches; the answers tell it, as an earlier fetch may have left chunks on the way
    number: int = 0


class KvProbe(msgspec.Struct, frozen=True, tag=True):
    """Send so many bytes, a slot at most: the path is tried."""

    nbytes: int


class KvCredit(msgspec.Struct, frozen=True, tag=True):
    """One more chunk may be sent."""

    key: KvKey


class KvFetched(msgspec.Struct, frozen=True, tag=True):
    """The fetch has ended: well, with ``error``, or aborted (``error.code == "cancelled"``)."""

    key: KvKey
    error: ErrorInfo | None = None


# owner's relay -> fetching relay


class KvChunk(msgspec.Struct, frozen=True, tag=True):
    """One chunk; its bytes are the one raw frame that follows."""

    key: KvKey
    chunk: Chunk
    #: of the fetch
    number: int = 0


class KvProof(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`KvProbe`; the bytes are the one raw frame that follows."""


class KvFetchFailed(msgspec.Struct, frozen=True, tag=True):
    """The fetch cannot go on."""

    key: KvKey
    error: ErrorInfo
    #: of the fetch
    number: int = 0


FromKvWorker: TypeAlias = (
    KvHello
    | KvPong
    | KvOffer
    | KvWithdraw
    | KvHeld
    | KvStaged
    | KvPull
    | KvTaken
    | KvPulled
    | KvAgain
    | KvAbort
    | KvExtend
    | KvList
)
ToKvWorker: TypeAlias = (
    KvWelcome
    | KvRefused
    | HelloWanted
    | KvPing
    | KvRelease
    | KvCancelled
    | KvListing
    | KvStage
    | KvGrant
    | KvChunkReady
    | KvFailed
)
FromFetcher: TypeAlias = RelayHello | KvFetch | KvCredit | KvFetched | KvExtend | KvList | KvProbe
ToFetcher: TypeAlias = HelloWanted | KvChunk | KvProof | KvFetchFailed | KvListing
