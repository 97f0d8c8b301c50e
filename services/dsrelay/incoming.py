"""Transfers that reach this node: the relay of the owner's node is asked for a ticket, with which the decode
instance then reads the KV itself.

Invariants: each pull is answered by a ticket or a failure; what stands still ends by a deadline: the source's
answer by ``timeout_s``, the rest by a lease from the reader's last sign of interest. Where owners send by
communicators a reader has one fetch under way at a time, and others wait for their turn; the answer then waits for
the owner's, too, and has no bound but that lease.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from dskv.handle import KvHandle, KvKey
from dskv.inspection import inspect
from dsrelay.events import RELAY, Action, Complain
from dsrelay.turns import Turns
from dswire.errors import Cancelled, DsError, ErrorInfo, Overloaded, ProtocolError, TransferFailed
from dswire.machine import Send
from dswire.messages import kv
from dswire.timers import Timers

#: transfers at once
MAX_TRANSFERS = 4_096


@dataclass(slots=True)
class Incoming:
    """One transfer."""

    #: the decode instance that pulls
    reader: str
    handle: KvHandle
    #: the relay of the owner's node
    source: str
    #: of the fetch
    number: int
    #: what the owner's side calls the reader
    name: str
    #: the ticket has come
    granted: bool = False
    #: the fetch was sent again, to a relay that had forgotten us
    repeated: bool = False
    #: what came was not what it should be
    again: bool = False


class IncomingTransfers:
    """Every transfer for the decode instances of this node."""

    def __init__(
        self,
        sources: Container[str],
        timeout_s: float,
        lease_s: float,
        out: list[Action],
        *,
        collective: bool = False,
    ) -> None:
        """``sources``: nodes that can be reached; ``collective``: owners send by communicators."""
        self.transfers: dict[KvKey, Incoming] = {}
        self.turns = Turns()
        #: fetches so far
        self._fetches = 0
        #: of those whose ticket has not come
        self._answers: Timers[KvKey] = Timers()
        #: one lease from the reader's last sign of interest
        self._wanted: Timers[KvKey] = Timers()
        self._sources = sources
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._out = out
        self._collective = collective

    # the reader

    def pull(self, now: float, reader: str, handle: KvHandle, name: str) -> None:
        """Get ``reader``, a process with that ``name``, a ticket, or tell it why not."""
        key = handle.key
        known = self.transfers.get(key)
        if known is not None and known.reader == reader:
            self._out.append(Complain(reader, ProtocolError(f"{key} is pulled twice")))
            return
        try:
            self._check(handle)
        except DsError as error:
            self._out.append(Send(reader, kv.KvFailed(key, error.info())))
            return
        self.transfers[key] = made = Incoming(reader, handle, RELAY + handle.node, 0, name)
        self._wanted.set(key, now + self._lease_s)
        if not self._collective or self.turns.take(reader, key):
            self._fetch(now, made)

    def extend(self, now: float, reader: str, key: KvKey) -> None:
        """The reader still wants it."""
        if self._of(reader, key) is not None:
            self._wanted.set(key, now + self._lease_s)

    def again(self, now: float, reader: str, key: KvKey) -> bool:
        """What came was wrong: another ticket. False when no transfer of that name is its own."""
        one = self._of(reader, key)
        if one is None or not one.granted or one.again:
            return False
        one.again = True
        self._fetch(now, one)
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

    def granted(self, now: float, source: str, message: kv.KvFetchGranted) -> None:
        """The ticket; one of an earlier fetch is dropped."""
        one = self.transfers.get(message.key)
        if one is None or (one.source, one.number) != (source, message.number) or one.granted:
            return
        one.granted = True
        self._answers.cancel(message.key)
        self._out.append(Send(one.reader, kv.KvGrant(message.key, message.ticket)))

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
        """That relay had forgotten us: ask again where no ticket has come yet, else give up."""
        for one in [one for one in self.transfers.values() if one.source == source and one.number]:
            if one.granted:
                error = TransferFailed(f"the relay of node {one.handle.node} was restarted in mid-transfer")
                self._give_up(now, one, error.info())
            elif not one.repeated:
                # answers to what was sent before it came may still arrive; they mean the same restart
                one.repeated = True
                self._fetch(now, one)

    # time

    def tick(self, now: float) -> None:
        """End transfers that wait for too long."""
        for key in self._answers.due(now):
            one = self.transfers[key]
            self._fail(now, one, f"nothing came from node {one.handle.node} for {self._timeout_s:g} s")
        for key in self._wanted.due(now):
            one = self.transfers[key]
            self._fail(now, one, f"{one.reader} said nothing of it for {self._lease_s:g} s")

    def next_deadline(self) -> float | None:
        """The earliest end of patience."""
        return min((at for at in (self._answers.next(), self._wanted.next()) if at is not None), default=None)

    def validate(self) -> None:
        """Every transfer has a deadline."""
        assert len(self._wanted) == len(self.transfers)
        late = sum(not one.granted for one in self.transfers.values())
        assert len(self._answers) == (0 if self._collective else late)
        assert self.turns.waiting == (len(self.transfers) if self._collective else 0)

    def _check(self, handle: KvHandle) -> None:
        inspect(handle)
        key = handle.key
        if handle.node not in self._sources:
            raise TransferFailed(f"the KV of {key} is on node {handle.node}, to which no transport leads from here")
        if key in self.transfers:
            raise TransferFailed(f"the KV of {key} is fetched for {self.transfers[key].reader} already")
        if len(self.transfers) >= MAX_TRANSFERS:
            raise Overloaded(f"{MAX_TRANSFERS} transfers are under way")

    def _fetch(self, now: float, one: Incoming) -> None:
        key, one.granted = one.handle.key, False
        self._fetches += 1
        one.number = self._fetches
        if not self._collective:
            self._answers.set(key, now + self._timeout_s)
        self._out.append(Send(one.source, kv.KvFetch(key, one.number, one.name)))

    def _of(self, reader: str, key: KvKey) -> Incoming | None:
        one = self.transfers.get(key)
        return one if one is not None and one.reader == reader else None

    def _give_up(self, now: float, one: Incoming, error: ErrorInfo) -> None:
        """The owner's side knows nothing of it any more."""
        self._drop(now, one)
        self._out.append(Send(one.reader, kv.KvFailed(one.handle.key, error)))

    def _fail(self, now: float, one: Incoming, why: str) -> None:
        error = TransferFailed(f"the KV of {one.handle.key} did not come: {why}").info()
        self._stop(now, one, error)
        self._out.append(Send(one.reader, kv.KvFailed(one.handle.key, error)))

    def _stop(self, now: float, one: Incoming, error: ErrorInfo | None) -> None:
        """End it, and tell the owner's side if that knows of it."""
        if one.number:
            self._out.append(Send(one.source, kv.KvFetched(one.handle.key, error)))
        self._drop(now, one)

    def _drop(self, now: float, one: Incoming) -> None:
        key = one.handle.key
        del self.transfers[key]
        self._answers.cancel(key)
        self._wanted.cancel(key)
        next_one = self.turns.give(one.reader, key)
        if next_one is not None:
            self._fetch(now, self.transfers[next_one])
