"""Transfers that leave this node: from the owner's pool, by a staging slot, to the relay that fetches.

Chunks leave in order, as many at a time as the fetching side gave credits. Slots are dealt round robin over the
transfers that want one, first come first served. Invariant: a slot has exactly one user; when a transfer ends
while the owner still copies into its slot, the slot stays taken until that copy's ``KvStaged``, or for
``orphan_s`` at most, since a late write into a slot in use would spoil somebody else's transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.send import plan
from dskv.staging import StagingSlots
from dsrelay.events import Action, SendChunk
from dsrelay.ledger import Ask, Ledger
from dswire.errors import ErrorInfo, ProtocolError, TransferFailed
from dswire.machine import Send
from dswire.messages import kv
from dswire.timers import Timers

#: more credits than this are taken for nonsense
MAX_CREDITS = 1_024

#: (fetching relay, handle): names a fetch before it is granted
Name: TypeAlias = tuple[str, KvKey]
#: (handle, index of a chunk): names a copy by the owner
Copy: TypeAlias = tuple[KvKey, int]


@dataclass(slots=True)
class Outgoing:
    """One transfer."""

    #: the relay that fetches
    peer: str
    handle: KvHandle
    chunks: tuple[kv.Chunk, ...]
    #: chunks that may still be staged and sent
    credits: int
    #: of the fetch
    number: int
    #: chunk index -> slot: the owner copies into it
    staging: dict[int, int] = field(default_factory=dict)
    #: chunk index -> slot: waits for an earlier chunk
    staged: dict[int, int] = field(default_factory=dict)
    next_stage: int = 0
    next_send: int = 0
    #: has its place in the queue for slots
    queued: bool = False

    @property
    def wants_slot(self) -> bool:
        """Whether another chunk may be staged."""
        return self.credits > 0 and self.next_stage < len(self.chunks)

    @property
    def sent(self) -> bool:
        """Whether the last chunk has left."""
        return self.next_send == len(self.chunks)


class OutgoingTransfers:
    """Every transfer to other relays; the ledger knows them as readers."""

    def __init__(
        self,
        ledger: Ledger,
        slots: StagingSlots[Copy],
        slot_nbytes: int,
        timeout_s: float,
        orphan_s: float,
        out: list[Action],
        tell: Callable[[str, msgspec.Struct], None],
    ) -> None:
        """``tell``: a message to an owner."""
        self.slots = slots
        #: by handle: the ledger grants each to one reader at a time
        self.transfers: dict[KvKey, Outgoing] = {}
        #: fetches that wait for the ledger's word
        self.asked: dict[Name, kv.KvFetch] = {}
        #: slots whose transfer has ended while the owner copies: the owner, and the slot
        self.orphans: dict[Copy, tuple[str, int]] = {}
        self._queue: deque[KvKey] = deque()
        self._progress: Timers[KvKey] = Timers()
        self._orphaned: Timers[Copy] = Timers()
        self._ledger = ledger
        self._slot_nbytes = slot_nbytes
        self._timeout_s = timeout_s
        self._orphan_s = orphan_s
        self._out = out
        self._tell = tell

    # the ledger's word

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """Begin to send."""
        key = handle.key
        fetch = self.asked.pop((peer, key))
        try:
            if any(of == key for of, _ in self.orphans):
                raise TransferFailed(f"an earlier transfer of {key} has not come to its end")
            self._begin(now, peer, handle, fetch)
        except TransferFailed as error:
            self._out.append(Send(peer, kv.KvFetchFailed(key, error.info(), fetch.number)))
            self._ledger.ended(now, peer, key, "lost")

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """The handle is gone, or cannot be had; nobody but its owner ever reads its blocks, so that is over."""
        of = self.asked.get((peer, key)) or self._transfer(peer, key)
        self._stop(now, peer, key)
        self._out.append(Send(peer, kv.KvFetchFailed(key, error, of.number if of is not None else 0)))
        self._ledger.ended(now, peer, key, "lost")

    # fetching relays

    def fetch(self, now: float, peer: str, message: kv.KvFetch) -> None:
        """Begin a transfer; the same fetch again is no error, it may be repeated after a hello."""
        name = (peer, message.key)
        known = self._transfer(*name)
        if known is not None and known.sent and message.again:
            self._begin(now, peer, known.handle, message)
        if name in self.asked or known is not None:
            return
        if not 0 < message.credits <= MAX_CREDITS or message.slot_nbytes < 1:
            error = ProtocolError(f"{message.credits} credits of {message.slot_nbytes} bytes make no transfer")
            self._out.append(Send(peer, kv.KvFetchFailed(message.key, error.info(), message.number)))
            return
        self.asked[name] = message
        self._ledger.ask(now, Ask(peer, message.key, self))

    def credit(self, now: float, peer: str, key: KvKey) -> None:
        """One more chunk may leave."""
        one = self._transfer(peer, key)
        if one is None or one.sent:
            return
        one.credits = min(one.credits + 1, len(one.chunks))
        self._progress.set(key, now + self._timeout_s)
        self._want(key, one)

    def ended(self, now: float, peer: str, message: kv.KvFetched) -> None:
        """The fetching side has it all, or has given up."""
        self._stop(now, peer, message.key)
        reason = "pulled"
        if message.error is not None:
            reason = "aborted" if message.error.code == "cancelled" else "lost"
        self._ledger.ended(now, peer, message.key, reason)

    def fetcher_lost(self, now: float, peer: str) -> None:
        """That relay is gone, or was started again."""
        reads = [key for key, one in self.transfers.items() if one.peer == peer]
        for key in [*reads, *(key for of, key in self.asked if of == peer)]:
            self._stop(now, peer, key)
        self._ledger.reader_lost(now, peer)

    # owners

    def staged(self, now: float, owner: str, key: KvKey, index: int) -> None:
        """The owner has copied a chunk: it leaves as soon as those before it have."""
        one, copy = self.transfers.get(key), (key, index)
        if copy in self.orphans:
            if self.orphans[copy][0] == owner:
                self._free_orphan(copy)
        elif one is not None and one.handle.owner == owner and index in one.staging:
            one.staged[index] = one.staging.pop(index)
            self._send(now, one)
        self._deal()

    def owner_restarted(self, owner: str) -> None:
        """A fresh process has that name: the old one writes no more."""
        for copy in [copy for copy, (of, _) in self.orphans.items() if of == owner]:
            self._free_orphan(copy)
        self._deal()

    # time

    def tick(self, now: float) -> None:
        """End transfers that stand still, and copies that never end."""
        for key in self._progress.due(now):
            peer = self.transfers[key].peer
            error = TransferFailed(f"no chunk of {key} could be staged or sent for {self._timeout_s:g} s")
            self.failed(now, peer, key, error.info())
        for copy in self._orphaned.due(now):
            self._free_orphan(copy)
        self._deal()

    def next_deadline(self) -> float | None:
        """The earliest of them."""
        return min((at for at in (self._progress.next(), self._orphaned.next()) if at is not None), default=None)

    def validate(self) -> None:
        """Every taken slot has one user, every transfer a handle that it reads."""
        self.slots.validate()
        used = [slot for one in self.transfers.values() for slot in (*one.staging.values(), *one.staged.values())]
        used += [slot for _, slot in self.orphans.values()]
        assert sorted(used) == sorted(self.slots.owners)
        assert len(self._orphaned) == len(self.orphans)
        for key, one in self.transfers.items():
            assert self._ledger.handles[key].reader == one.peer
            assert (key in self._progress) != one.sent
            assert one.queued == (key in self._queue)
            assert one.queued or not one.wants_slot
            assert (one.peer, key) not in self.asked
        for peer, key in self.asked:
            assert self._ledger.early[key].peer == peer

    def _begin(self, now: float, peer: str, handle: KvHandle, fetch: kv.KvFetch) -> None:
        slot_nbytes = min(self._slot_nbytes, fetch.slot_nbytes)
        chunks = plan(len(handle.blocks), handle.layout.block_nbytes, slot_nbytes)
        self.transfers[handle.key] = made = Outgoing(peer, handle, chunks, fetch.credits, fetch.number)
        self._progress.set(handle.key, now + self._timeout_s)
        self._want(handle.key, made)

    def _transfer(self, peer: str, key: KvKey) -> Outgoing | None:
        one = self.transfers.get(key)
        return one if one is not None and one.peer == peer else None

    def _want(self, key: KvKey, one: Outgoing) -> None:
        if one.wants_slot and not one.queued:
            one.queued = True
            self._queue.append(key)
        self._deal()

    def _deal(self) -> None:
        while self._queue and self.slots.free:
            key = self._queue.popleft()
            one = self.transfers[key]
            self._stage(one)
            one.queued = one.wants_slot
            if one.queued:
                self._queue.append(key)

    def _stage(self, one: Outgoing) -> None:
        chunk, key = one.chunks[one.next_stage], one.handle.key
        slot = self.slots.take((key, chunk.index))
        assert slot is not None
        one.staging[chunk.index] = slot
        one.next_stage += 1
        one.credits -= 1
        self._tell(one.handle.owner, kv.KvStage(key, chunk, slot))

    def _send(self, now: float, one: Outgoing) -> None:
        key = one.handle.key
        while one.next_send in one.staged:
            chunk, slot = one.chunks[one.next_send], one.staged.pop(one.next_send)
            nbytes = chunk.count * one.handle.layout.block_nbytes
            self._out.append(SendChunk(one.peer, kv.KvChunk(key, chunk, one.number), slot, nbytes))
            # the shell sends a copy before it performs any later action, so the slot may be dealt again
            self.slots.give(slot)
            one.next_send += 1
        if one.sent:
            # the handle's lease bounds the wait for the other side's verdict
            self._progress.cancel(key)
        else:
            self._progress.set(key, now + self._timeout_s)

    def _stop(self, now: float, peer: str, key: KvKey) -> None:
        self.asked.pop((peer, key), None)
        one = self._transfer(peer, key)
        if one is None:
            return
        del self.transfers[key]
        self._progress.cancel(key)
        if one.queued:
            self._queue.remove(key)
        for slot in one.staged.values():
            self.slots.give(slot)
        for index, slot in one.staging.items():
            self.orphans[key, index] = (one.handle.owner, slot)
            self._orphaned.set((key, index), now + self._orphan_s)
        self._deal()

    def _free_orphan(self, copy: Copy) -> None:
        _, slot = self.orphans.pop(copy)
        self._orphaned.cancel(copy)
        self.slots.give(slot)
