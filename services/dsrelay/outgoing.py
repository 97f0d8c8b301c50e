"""Transfers that leave this node: streams, by which decode instances of other nodes read an owner's pool; or, where
the topology says so, what owners send by communicators, each owner one at a time.

The relay that fetches for it is the ledger's reader. What bounds a transfer is the lease of its handle, which that
side renews, and the patience of the two ends of the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrelay.events import Action, CloseStream, OpenStream
from dsrelay.ledger import Ask, Ledger
from dsrelay.turns import Turns
from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.messages import kv

#: (fetching relay, handle): names a fetch before it is granted
Name: TypeAlias = tuple[str, KvKey]


@dataclass(slots=True)
class Outgoing:
    """One transfer."""

    #: the relay that fetches
    peer: str
    #: of the fetch
    number: int
    #: who reads, and from whom
    reader: str
    owner: str
    #: by a stream of ours; else its owner sends it
    streamed: bool


class OutgoingTransfers:
    """Every transfer to other nodes; the ledger knows the relays there as readers."""

    def __init__(
        self,
        ledger: Ledger,
        out: list[Action],
        tell: Callable[[str, msgspec.Struct], None],
        streamed: Callable[[str], bool],
    ) -> None:
        """``tell``: a message to an owner; ``streamed``: whether readers read what is its own from us."""
        #: by handle: the ledger grants each to one reader at a time
        self.transfers: dict[KvKey, Outgoing] = {}
        #: fetches that wait for the ledger's word
        self.asked: dict[Name, kv.KvFetch] = {}
        self.turns = Turns()
        self._ledger = ledger
        self._out = out
        self._tell = tell
        self._streamed = streamed

    # the ledger's word

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """Have a stream opened, or have the owner send; the ticket is the answer to the fetch."""
        fetch = self.asked.pop((peer, handle.key))
        streamed = self._streamed(handle.owner)
        self.transfers[handle.key] = Outgoing(peer, fetch.number, fetch.reader, handle.owner, streamed)
        if streamed:
            self._out.append(OpenStream(peer, handle, fetch.number))
        elif self.turns.take(handle.owner, handle.key):
            self._send(handle.key)

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """The handle is gone, or cannot be had; nobody but its owner ever reads its blocks, so that is over."""
        of = self._transfer(peer, key) or self.asked.get((peer, key))
        number = of.number if of is not None else 0
        self._out.append(Send(peer, kv.KvFetchFailed(key, error, number)))
        self._ledger.ended(now, peer, key, "lost")
        self._stop(peer, key)

    # fetching relays

    def fetch(self, now: float, peer: str, message: kv.KvFetch) -> None:
        """Begin a transfer. A later fetch of what it reads begins that anew; the same one changes nothing."""
        key, number = message.key, message.number
        known = self._transfer(peer, key)
        if known is not None:
            if number != known.number:
                known.number = number
                self._anew(key)
            return
        waits = (peer, key) in self.asked
        self.asked[peer, key] = message
        if not waits:
            self._ledger.ask(now, Ask(peer, key, self))

    def ended(self, now: float, peer: str, message: kv.KvFetched) -> None:
        """The fetching side has it all, or has given up."""
        reason = "pulled"
        if message.error is not None:
            reason = "aborted" if message.error.code == "cancelled" else "lost"
        # an owner hears of this end before it is asked for the next
        self._ledger.ended(now, peer, message.key, reason)
        self._stop(peer, message.key)

    def fetcher_lost(self, now: float, peer: str) -> None:
        """That relay is gone, or was started again."""
        reads = [key for key, one in self.transfers.items() if one.peer == peer]
        self._ledger.reader_lost(now, peer)
        for key in [*reads, *(key for of, key in self.asked if of == peer)]:
            self._stop(peer, key)

    # owners

    def sending(self, now: float, owner: str, message: kv.KvSending) -> None:
        """An owner tells where its reader is met, or why it cannot be."""
        key, one = message.key, self.transfers.get(message.key)
        if one is None or one.number != message.number or not self.turns.has(owner, key):
            return
        if message.error is not None:
            self.failed(now, one.peer, key, message.error)
        else:
            ticket = kv.Ticket(b"", meeting=message.meeting)
            self._out.append(Send(one.peer, kv.KvFetchGranted(key, ticket, one.number)))

    def validate(self) -> None:
        """Every transfer has a handle that it reads."""
        for key, one in self.transfers.items():
            assert self._ledger.handles[key].reader == one.peer
            assert (one.peer, key) not in self.asked
        assert self.turns.waiting == sum(not one.streamed for one in self.transfers.values())
        for peer, key in self.asked:
            assert self._ledger.early[key].peer == peer

    def _transfer(self, peer: str, key: KvKey) -> Outgoing | None:
        one = self.transfers.get(key)
        return one if one is not None and one.peer == peer else None

    def _stop(self, peer: str, key: KvKey) -> None:
        self.asked.pop((peer, key), None)
        one = self._transfer(peer, key)
        if one is None:
            return
        del self.transfers[key]
        if one.streamed:
            self._out.append(CloseStream(key))
            return
        next_one = self.turns.give(one.owner, key)
        if next_one is not None:
            self._send(next_one)

    def _anew(self, key: KvKey) -> None:
        one = self.transfers[key]
        if one.streamed:
            handle = self._ledger.handles[key].handle
            self._out += [CloseStream(key), OpenStream(one.peer, handle, one.number)]
        elif self.turns.has(one.owner, key):
            self._send(key)

    def _send(self, key: KvKey) -> None:
        one = self.transfers[key]
        self._tell(one.owner, kv.KvSend(key, one.reader, one.number))
