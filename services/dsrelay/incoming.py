"""Transfers that reach this node: from another relay, by a staging slot, to the decode instance that pulls.

A credit is a slot reserved for one chunk. A pull gets ``CREDITS`` of them at most; one that finds no slot free
waits, first come first served. Invariants: chunks are taken in order and only into reserved slots; whatever a
peer sends out of turn or in a wrong size ends that one transfer, with a typed error, and harms nothing else;
every transfer has a deadline, which only progress moves, and ends one lease after its reader's last sign of
interest. The slots of a transfer that has ended are free at once:
a reader that still looks at one has been told to drop what it read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

from dskv.handle import KvHandle, KvKey
from dskv.inspection import inspect
from dskv.staging import StagingSlots
from dsrelay.events import RELAY, Action, ChunkArrived, Complain, StoreChunk
from dswire.errors import Cancelled, DsError, ErrorInfo, KvCorrupt, Overloaded, ProtocolError, TransferFailed
from dswire.machine import Send
from dswire.messages import kv
from dswire.timers import Timers

#: chunks of one transfer on their way at once
CREDITS = 4
#: transfers at once, waiting or under way
MAX_TRANSFERS = 4_096


@dataclass(slots=True)
class Incoming:
    """One transfer."""

    #: the decode instance that pulls
    reader: str
    handle: KvHandle
    #: the relay of the owner's node
    source: str
    #: blocks that a slot holds
    per_slot: int
    #: of the fetch
    number: int
    #: credits given: slots whose chunk is still to come
    reserved: deque[int] = field(default_factory=deque)
    #: chunk index -> slot: the reader copies it
    filled: dict[int, int] = field(default_factory=dict)
    received: int = 0
    next_index: int = 0
    #: KvFetch was sent
    begun: bool = False
    #: ... and sent again, to a relay that had forgotten us
    repeated: bool = False
    #: all had come, and was not what it should be
    again: bool = False

    @property
    def missing(self) -> int:
        """Blocks that have not come."""
        return len(self.handle.blocks) - self.received

    @property
    def wanted(self) -> int:
        """Slots to reserve beyond those it has."""
        chunks = -(-self.missing // self.per_slot)
        return min(CREDITS - len(self.filled), chunks) - len(self.reserved)


class IncomingTransfers:
    """Every transfer for the decode instances of this node."""

    def __init__(
        self,
        sources: Container[str],
        slots: StagingSlots[KvKey],
        slot_nbytes: int,
        timeout_s: float,
        lease_s: float,
        out: list[Action],
    ) -> None:
        """``sources``: nodes that can be reached; ``lease_s``: also the longest wait for a slot."""
        self.slots = slots
        self.transfers: dict[KvKey, Incoming] = {}
        #: those without a slot yet
        self.waiting: deque[KvKey] = deque()
        #: fetches so far
        self._fetches = 0
        self._deadlines: Timers[KvKey] = Timers()
        #: one lease from the reader's last sign of interest
        self._wanted: Timers[KvKey] = Timers()
        self._sources = sources
        self._slot_nbytes = slot_nbytes
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._out = out

    # the reader

    def pull(self, now: float, reader: str, handle: KvHandle) -> None:
        """Bring the KV to ``reader``, or tell it why not."""
        key = handle.key
        known = self.transfers.get(key)
        if known is not None and known.reader == reader:
            self._out.append(Complain(reader, ProtocolError(f"{key} is pulled twice")))
            return
        try:
            per_slot = self._check(handle)
        except DsError as error:
            self._out.append(Send(reader, kv.KvFailed(key, error.info())))
            return
        self.transfers[key] = Incoming(reader, handle, RELAY + handle.node, per_slot, self._fetches)
        self._fetches += 1
        self._deadlines.set(key, now + self._lease_s)
        self._wanted.set(key, now + self._lease_s)
        self.waiting.append(key)
        self._deal(now)

    def extend(self, now: float, reader: str, key: KvKey) -> None:
        """The reader still wants it."""
        if self._of(reader, key) is not None:
            self._wanted.set(key, now + self._lease_s)

    def taken(self, now: float, reader: str, key: KvKey, index: int) -> None:
        """The reader has copied a chunk: its slot serves for the next one."""
        one = self._of(reader, key)
        if one is None or index not in one.filled:
            return
        slot = one.filled.pop(index)
        self._deadlines.set(key, now + self._timeout_s)
        self._wanted.set(key, now + self._lease_s)
        if one.wanted > 0:
            one.reserved.append(slot)
            self._out.append(Send(one.source, kv.KvCredit(key)))
        else:
            self.slots.give(slot)
            self._deal(now)

    def again(self, now: float, reader: str, key: KvKey) -> bool:
        """All had come and was wrong: bring it once more. False when no whole transfer of that name is its own."""
        one = self._of(reader, key)
        if one is None or one.missing or one.again:
            return False
        slots = list(one.filled.values())
        one.filled.clear()
        one.received = one.next_index = 0
        one.begun, one.again = False, True
        self.waiting.append(key)
        self._deadlines.set(key, now + self._lease_s)
        for slot in slots:
            self.slots.give(slot)
        self._deal(now)
        return True

    def ended(self, now: float, reader: str, key: KvKey, error: ErrorInfo | None) -> bool:
        """The reader has all and has verified it, or not; False when no transfer of that name is its own."""
        one = self._of(reader, key)
        if one is None:
            return False
        self._stop(now, one, error)
        return True

    def abort(self, now: float, reader: str, key: KvKey) -> bool:
        """The reader wants it no more; False when no transfer of that name is its own."""
        return self.ended(now, reader, key, Cancelled("the sequence was aborted").info())

    def reader_lost(self, now: float, reader: str) -> None:
        """The decode instance is gone, or has forgotten what it pulled."""
        for one in [one for one in self.transfers.values() if one.reader == reader]:
            self._stop(now, one, TransferFailed(f"the reader of {one.handle.key} was lost").info())

    # the other relay

    def arrived(self, event: ChunkArrived) -> None:
        """Put a chunk into its slot and tell the reader. One that nobody waits for any more is dropped."""
        now, chunk = event.now, event.chunk
        one = self.transfers.get(event.key)
        if one is None or (one.source, one.number) != (event.peer, event.number) or not one.begun:
            return
        error = self._wrong(one, event)
        if error is not None:
            self._out.append(Complain(event.peer, error))
            self._fail(now, one, error.info())
            return
        slot = one.reserved.popleft()
        one.filled[chunk.index] = slot
        one.received += chunk.count
        one.next_index += 1
        self._deadlines.set(event.key, now + self._timeout_s)
        self._out += [StoreChunk(slot), Send(one.reader, kv.KvChunkReady(event.key, chunk, slot))]

    def source_failed(self, now: float, source: str, failed: kv.KvFetchFailed) -> None:
        """The owner's side has ended the transfer."""
        one = self.transfers.get(failed.key)
        if one is not None and (one.source, one.number) == (source, failed.number):
            self._give_up(now, one, failed.error)

    def source_lost(self, now: float, source: str) -> None:
        """That relay cannot be reached."""
        for one in [one for one in self.transfers.values() if one.source == source]:
            error = TransferFailed(f"the relay of node {one.handle.node} cannot be reached")
            self._give_up(now, one, error.info())

    def source_restarted(self, now: float, source: str) -> None:
        """That relay had forgotten us: ask again where nothing has come yet, else give up."""
        for one in [one for one in self.transfers.values() if one.source == source and one.begun]:
            if one.received:
                error = TransferFailed(f"the relay of node {one.handle.node} was restarted in mid-transfer")
                self._give_up(now, one, error.info())
            elif not one.repeated:
                # answers to what was sent before it came may still arrive; they mean the same restart
                one.repeated = True
                self._fetch(one)

    # time

    def tick(self, now: float) -> None:
        """End transfers that wait or stand still for too long."""
        for key in self._deadlines.due(now):
            one = self.transfers[key]
            self._fail(now, one, TransferFailed(f"the KV of {key} did not come: {self._stuck(one)}").info())
        for key in self._wanted.due(now):
            one = self.transfers[key]
            error = TransferFailed(f"{one.reader} said nothing of {key} for {self._lease_s:g} s")
            self._fail(now, one, error.info())

    def next_deadline(self) -> float | None:
        """The earliest end of patience."""
        return min((at for at in (self._deadlines.next(), self._wanted.next()) if at is not None), default=None)

    def validate(self) -> None:
        """Every taken slot belongs to one transfer, every transfer has a deadline."""
        self.slots.validate()
        used = [slot for one in self.transfers.values() for slot in (*one.reserved, *one.filled.values())]
        assert sorted(used) == sorted(self.slots.owners)
        assert len(self._deadlines) == len(self._wanted) == len(self.transfers)
        assert len(self.waiting) == len(set(self.waiting))
        assert set(self.waiting) == {key for key, one in self.transfers.items() if not one.begun}
        assert not (self.waiting and self.slots.free), "a slot is free and a transfer waits"
        for key, one in self.transfers.items():
            assert key in self._deadlines
            assert one.begun or not (one.reserved or one.filled or one.received)
            assert one.missing >= 0
            assert len(one.reserved) + len(one.filled) <= CREDITS
            assert one.missing or not one.reserved

    def _stuck(self, one: Incoming) -> str:
        if not one.begun:
            return f"no staging slot became free for {self._lease_s:g} s"
        if one.filled or not one.missing:
            return f"{one.reader} did not take what had come for {self._timeout_s:g} s"
        return f"nothing came from node {one.handle.node} for {self._timeout_s:g} s"

    def _check(self, handle: KvHandle) -> int:
        inspect(handle)
        key, block_nbytes = handle.key, handle.layout.block_nbytes
        if handle.node not in self._sources:
            raise TransferFailed(f"the KV of {key} is on node {handle.node}, to which no transport leads from here")
        if key in self.transfers:
            raise TransferFailed(f"the KV of {key} is fetched for {self.transfers[key].reader} already")
        if len(self.transfers) >= MAX_TRANSFERS:
            raise Overloaded(f"{MAX_TRANSFERS} transfers wait or are under way")
        if block_nbytes > self._slot_nbytes:
            raise TransferFailed(
                f"a KV block of {block_nbytes} bytes does not fit a staging slot of {self._slot_nbytes} bytes",
                remedy="raise relay.slot in the topology, or lower kv.block_size",
            )
        return self._slot_nbytes // block_nbytes

    def _wrong(self, one: Incoming, event: ChunkArrived) -> DsError | None:
        key, chunk = event.key, event.chunk
        if (chunk.index, chunk.first) != (one.next_index, one.received):
            due = f"chunk {one.next_index} at block {one.received}"
            return TransferFailed(f"{key}: chunk {chunk.index} at block {chunk.first} came where {due} is due")
        if not 0 < chunk.count <= min(one.missing, one.per_slot):
            return TransferFailed(f"{key}: a chunk of {chunk.count} blocks came, {one.missing} were missing")
        if event.nbytes != chunk.count * one.handle.layout.block_nbytes:
            return KvCorrupt(f"{key}: a chunk of {chunk.count} blocks came with {event.nbytes} bytes")
        if not one.reserved:
            return ProtocolError(f"{key}: chunk {chunk.index} came without a credit")
        return None

    def _deal(self, now: float) -> None:
        while self.waiting and self.slots.free:
            self._begin(now, self.transfers[self.waiting.popleft()])
        for one in self.transfers.values():
            if not self.slots.free:
                return
            for _ in range(self._reserve(one) if one.begun else 0):
                self._out.append(Send(one.source, kv.KvCredit(one.handle.key)))

    def _begin(self, now: float, one: Incoming) -> None:
        self._reserve(one)
        one.begun = True
        self._deadlines.set(one.handle.key, now + self._timeout_s)
        self._fetch(one)

    def _fetch(self, one: Incoming) -> None:
        fetch = kv.KvFetch(one.handle.key, len(one.reserved), self._slot_nbytes, one.again, one.number)
        self._out.append(Send(one.source, fetch))

    def _reserve(self, one: Incoming) -> int:
        """Take as many free slots as it wants; returns how many."""
        count = max(0, min(one.wanted, self.slots.free))
        for _ in range(count):
            slot = self.slots.take(one.handle.key)
            assert slot is not None
            one.reserved.append(slot)
        return count

    def _of(self, reader: str, key: KvKey) -> Incoming | None:
        one = self.transfers.get(key)
        return one if one is not None and one.reader == reader else None

    def _give_up(self, now: float, one: Incoming, error: ErrorInfo) -> None:
        """The owner's side knows nothing of it any more."""
        self._drop(now, one)
        self._out.append(Send(one.reader, kv.KvFailed(one.handle.key, error)))

    def _fail(self, now: float, one: Incoming, error: ErrorInfo) -> None:
        self._stop(now, one, error)
        self._out.append(Send(one.reader, kv.KvFailed(one.handle.key, error)))

    def _stop(self, now: float, one: Incoming, error: ErrorInfo | None) -> None:
        """End it, and tell the owner's side if that knows of it."""
        if one.begun or one.again:
            self._out.append(Send(one.source, kv.KvFetched(one.handle.key, error)))
        self._drop(now, one)

    def _drop(self, now: float, one: Incoming) -> None:
        key = one.handle.key
        del self.transfers[key]
        self._deadlines.cancel(key)
        self._wanted.cancel(key)
        if not one.begun:
            self.waiting.remove(key)
        for slot in (*one.reserved, *one.filled.values()):
            self.slots.give(slot)
        self._deal(now)
