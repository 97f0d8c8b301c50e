"""Transfers that leave this node: streams, by which decode instances of other nodes read an owner's pool.

The relay that fetches for it is the ledger's reader. What bounds a transfer is the lease of its handle, which that
side renews, and the patience of the two ends of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dskv.handle import KvHandle, KvKey
from dsrelay.events import Action, CloseStream, OpenStream
from dsrelay.ledger import Ask, Ledger
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


class OutgoingTransfers:
    """Every transfer to other nodes; the ledger knows the relays there as readers."""

    def __init__(self, ledger: Ledger, out: list[Action]) -> None:
        #: by handle: the ledger grants each to one reader at a time
        self.transfers: dict[KvKey, Outgoing] = {}
        #: numbers of fetches that wait for the ledger's word
        self.asked: dict[Name, int] = {}
        self._ledger = ledger
        self._out = out

    # the ledger's word

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """Have a stream opened; its ticket is the answer to the fetch."""
        self.transfers[handle.key] = one = Outgoing(peer, self.asked.pop((peer, handle.key)))
        self._out.append(OpenStream(peer, handle, one.number))

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """The handle is gone, or cannot be had; nobody but its owner ever reads its blocks, so that is over."""
        known = self._transfer(peer, key)
        number = known.number if known is not None else self.asked.get((peer, key), 0)
        self._stop(peer, key)
        self._out.append(Send(peer, kv.KvFetchFailed(key, error, number)))
        self._ledger.ended(now, peer, key, "lost")

    # fetching relays

    def fetch(self, now: float, peer: str, message: kv.KvFetch) -> None:
        """Begin a transfer. A later fetch of what it reads begins that anew; the same one changes nothing."""
        key, number = message.key, message.number
        known = self._transfer(peer, key)
        if known is not None:
            if number != known.number:
                self._out.append(CloseStream(key))
                known.number = number
                self._out.append(OpenStream(peer, self._ledger.handles[key].handle, number))
            return
        waits = (peer, key) in self.asked
        self.asked[peer, key] = number
        if not waits:
            self._ledger.ask(now, Ask(peer, key, self))

    def ended(self, now: float, peer: str, message: kv.KvFetched) -> None:
        """The fetching side has it all, or has given up."""
        self._stop(peer, message.key)
        reason = "pulled"
        if message.error is not None:
            reason = "aborted" if message.error.code == "cancelled" else "lost"
        self._ledger.ended(now, peer, message.key, reason)

    def fetcher_lost(self, now: float, peer: str) -> None:
        """That relay is gone, or was started again."""
        reads = [key for key, one in self.transfers.items() if one.peer == peer]
        for key in [*reads, *(key for of, key in self.asked if of == peer)]:
            self._stop(peer, key)
        self._ledger.reader_lost(now, peer)

    def validate(self) -> None:
        """Every transfer has a handle that it reads."""
        for key, one in self.transfers.items():
            assert self._ledger.handles[key].reader == one.peer
            assert (one.peer, key) not in self.asked
        for peer, key in self.asked:
            assert self._ledger.early[key].peer == peer

    def _transfer(self, peer: str, key: KvKey) -> Outgoing | None:
        one = self.transfers.get(key)
        return one if one is not None and one.peer == peer else None

    def _stop(self, peer: str, key: KvKey) -> None:
        self.asked.pop((peer, key), None)
        if self._transfer(peer, key) is not None:
            del self.transfers[key]
            self._out.append(CloseStream(key))
