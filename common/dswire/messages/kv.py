"""Prefill, decode <-> the relay of their node, and relay <-> relay.

Relays grant and end every hand-off; the bytes are the reader's business. Same host: the decode instance copies
straight from the owner's mapped pool. The copy need not wait for the grant: a checksum that fits proves it; where
it does not, it is made again once granted. Else the relay of the owner's node gives a ticket, with which the decode
instance reads the blocks from that relay's stream port (``dskv.stream``).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import KvShard
from dswire.errors import ErrorInfo
from dswire.messages.worker import HelloWanted


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Good for reading one handle's KV from the relay of its node, once."""

    #: ``dskv.stream.TOKEN_NBYTES`` bytes that nobody can guess
    token: bytes
    #: key under which the stream is sealed; empty where nothing is encrypted
    secret: bytes = b""
    #: where the owner is met that sends it by a communicator; empty where a stream is read
    meeting: str = ""


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


class KvSending(msgspec.Struct, frozen=True, tag=True):
    """Prefill: answer to :class:`KvSend`: where the reader is met, or why it cannot be."""

    key: KvKey
    number: int
    meeting: str = ""
    error: ErrorInfo | None = None


class KvMeeting(msgspec.Struct, frozen=True, tag=True):
    """Prefill: answer to :class:`KvMeet`: where it is met for that, or why it cannot be."""

    reader: str
    by: str
    meeting: str = ""
    error: ErrorInfo | None = None


class KvTried(msgspec.Struct, frozen=True, tag=True):
    """Decode: answer to :class:`KvTry`: how fast it was, or why it cannot be."""

    owner: str
    bytes_per_s: float = 0.0
    error: ErrorInfo | None = None


class KvPull(msgspec.Struct, frozen=True, tag=True):
    """Decode: blocks are reserved, bring the KV."""

    handle: KvHandle


class KvPulled(msgspec.Struct, frozen=True, tag=True):
    """Decode: all is there and verified; or, with ``error``, is not."""

    key: KvKey
    error: ErrorInfo | None = None


class KvAgain(msgspec.Struct, frozen=True, tag=True):
    """Decode: the checksum is wrong, or the stream broke; the same once more, from the source."""

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
    """Registered."""

    relay: str
    incarnation: str
    lease_s: float
    #: KV is summed where it is made and where it arrives
    verify: bool = True
    #: KV that is offered on this node is copied straight from its owner's pool
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
    #: "shm", "cuda_ipc", "tcp", "gloo" or "nccl"
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
    #: streams that leave the node now
    streams: int
    paths: tuple[PathInfo, ...] = ()


class KvSend(msgspec.Struct, frozen=True, tag=True):
    """To the owner: send this KV to ``reader`` by a communicator; nothing else is sent or read meanwhile."""

    key: KvKey
    reader: str
    #: of the fetch
    number: int


class KvMeet(msgspec.Struct, frozen=True, tag=True):
    """To an owner: make a communicator with ``reader`` to try it; the relay ``by`` wants to know."""

    reader: str
    by: str


class KvTry(msgspec.Struct, frozen=True, tag=True):
    """Decode: read some of this pool, which only those who have a GPU can open; or meet the owner there."""

    owner: str
    pool: PoolInfo | None = None
    meeting: str = ""


class KvGrant(msgspec.Struct, frozen=True, tag=True):
    """To decode: copy straight from the owner's segment; or, with a ticket, read from the relay of its node."""

    key: KvKey
    ticket: Ticket | None = None


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
    """A ticket for this handle, please; the same again after its stream was not what it should be."""

    key: KvKey
    #: of the fetching side's fetches; the answers tell it, as an earlier fetch may have left some on the way
    number: int = 0
    #: for whom it is: its name and incarnation
    reader: str = ""


class KvProbe(msgspec.Struct, frozen=True, tag=True):
    """A ticket for any bytes, please: the path is tried; or a meeting of each owner with this reader."""

    reader: str = ""


class KvFetched(msgspec.Struct, frozen=True, tag=True):
    """The fetch has ended: well, with ``error``, or aborted (``error.code == "cancelled"``)."""

    key: KvKey
    error: ErrorInfo | None = None


# owner's relay -> fetching relay


class KvFetchGranted(msgspec.Struct, frozen=True, tag=True):
    """The ticket. It is good until the fetch has ended."""

    key: KvKey
    ticket: Ticket
    #: of the fetch
    number: int = 0


class KvProof(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`KvProbe`: a ticket for ``nbytes`` bytes."""

    ticket: Ticket
    nbytes: int


class KvMet(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`KvProbe` for a reader, one for each owner: where that one is met, or why it cannot be."""

    owner: str
    reader: str
    meeting: str = ""
    error: ErrorInfo | None = None


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
    | KvSending
    | KvMeeting
    | KvTried
    | KvPull
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
    | KvSend
    | KvMeet
    | KvTry
    | KvGrant
    | KvFailed
)
FromFetcher: TypeAlias = RelayHello | KvFetch | KvFetched | KvExtend | KvList | KvProbe
ToFetcher: TypeAlias = HelloWanted | KvFetchGranted | KvProof | KvMet | KvFetchFailed | KvListing
