"""The handles that this node's owners have offered: who reads them, and when the owner gets its blocks back.

Invariants: each accepted offer ends in exactly one ``KvRelease``, unless its owner is gone; every handle has a
deadline; a handle has at most one reader. An asker that comes before the offer (they use different sockets) is
held for ``EARLY_S``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, TypeAlias

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.inspection import inspect
from dskv.lifecycle import HandlePhase, OfferedHandle
from dsrelay.events import WORKER, Action, Complain
from dswire.errors import ErrorInfo, Overloaded, ProtocolError, TransferFailed
from dswire.messages import kv
from dswire.timers import Timers

#: seconds that a pull or fetch waits for its offer
EARLY_S = 2.0
#: askers that wait for an offer, and handles, at once
MAX_EARLY = 4_096
MAX_HANDLES = 65_536


#: handles in one listing
MAX_LISTED = 1_000

#: what became of a handle that was cancelled, as ``KvCancelled`` tells it
CancelResult: TypeAlias = Literal["freed", "in_flight_quarantined", "unknown"]


class Readers(Protocol):
    """One kind of reader: the ledger's word to it."""

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """The reading begins; it ends with :meth:`Ledger.ended` or :meth:`failed`."""

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """The reading has ended, or cannot begin."""


class Successor(Readers, Protocol):
    """Reads what another reader has read, before the owner has its blocks back."""

    #: its name as a reader
    name: str

    def takes(self, now: float, handle: KvHandle) -> bool:
        """Whether it wants to, now; if so it is granted that at once."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Somebody wants to read."""

    peer: str
    key: KvKey
    readers: Readers
    #: the handle as the asker knows it
    expected: KvHandle | None = None


class Ledger:
    """Every live offer of one node."""

    def __init__(
        self, node: str, lease_s: float, out: list[Action], tell: Callable[[str, msgspec.Struct], None]
    ) -> None:
        """``tell``: a message to an owner."""
        #: reads after the reader
        self.successor: Successor | None = None
        self.handles: dict[KvKey, OfferedHandle] = {}
        #: askers that came before the offer; one for each key
        self.early: dict[KvKey, Ask] = {}
        self._reading: dict[KvKey, Readers] = {}
        self._leases: Timers[KvKey] = Timers()
        self._patience: Timers[KvKey] = Timers()
        self._node = node
        self._lease_s = lease_s
        self._out = out
        self._tell = tell

    # owners

    def offer(self, now: float, owner: str, handle: KvHandle, lease_s: float | None = None) -> None:
        """Take an offer of the worker ``owner``, for a lease or for ``lease_s``; the same again changes nothing."""
        known = self.handles.get(handle.key)
        try:
            self._check(owner, handle, known)
        except (ProtocolError, Overloaded) as error:
            self._out.append(Complain(WORKER + owner, error))
            self._tell(owner, kv.KvRelease(handle.key, "lost"))
            return
        if known is not None and known.handle == handle:
            return
        if known is not None:
            self._forget(now, known, TransferFailed(f"{handle.key} was offered anew by {owner}"))
        self.handles[handle.key] = made = OfferedHandle(handle, now, self._lease_s)
        if lease_s is not None:
            made.deadline = now + min(max(lease_s, 0.0), self._lease_s)
        self._leases.set(handle.key, made.deadline)
        early = self.early.pop(handle.key, None)
        if early is not None:
            self._patience.cancel(handle.key)
            self._begin(now, made, early)

    def withdraw(self, now: float, owner: str, key: KvKey) -> CancelResult:
        """The owner wants its blocks back."""
        known = self._offered(owner, key)
        if known is None:
            return "unknown"
        known.withdraw(now)
        self._settle(known)
        return "freed" if known.ended else "in_flight_quarantined"

    def held(self, owner: str, key: KvKey) -> None:
        """The owner asks whether its offer is known; one that is not was released, and the word of it lost."""
        if self._offered(owner, key) is None:
            self._tell(owner, kv.KvRelease(key, "lost"))

    def owner_lost(self, now: float, owner: str) -> None:
        """The worker is gone, or was started again: its handles are void."""
        for known in [one for one in self.handles.values() if one.handle.owner == owner]:
            self._forget(now, known, TransferFailed(f"{owner}, which held the KV of {known.handle.key}, was lost"))

    # readers

    def ask(self, now: float, ask: Ask) -> None:
        """Begin to read, now or as soon as the offer comes."""
        known = self.handles.get(ask.key)
        if known is not None:
            self._begin(now, known, ask)
        elif ask.key in self.early or len(self.early) >= MAX_EARLY:
            self._refuse(now, ask, "is waited for by another reader, or too many wait")
        else:
            self.early[ask.key] = ask
            self._patience.set(ask.key, now + EARLY_S)

    def ended(self, now: float, peer: str, key: KvKey, reason: str) -> CancelResult:
        """``peer`` reads no more: "pulled", "aborted" or "lost". Others than the reader change nothing."""
        early, known = self.early.get(key), self.handles.get(key)
        if early is not None and early.peer == peer:
            del self.early[key]
            self._patience.cancel(key)
            return "freed"
        if known is None or known.reader != peer:
            return "unknown"
        if reason == "pulled" and self._hand_on(now, known):
            return "freed"
        known.read_ended(now, reason)
        self._settle(known)
        return "freed"

    def again(self, peer: str, key: KvKey) -> bool:
        """Whether ``peer`` reads that handle, and may begin anew."""
        known = self.handles.get(key)
        return known is not None and known.reader == peer and known.phase is HandlePhase.PULLING

    def reader_lost(self, now: float, peer: str) -> None:
        """Whatever ``peer`` reads or waits for has ended."""
        waits = [key for key, ask in self.early.items() if ask.peer == peer]
        reads = [key for key, one in self.handles.items() if one.reader == peer]
        for key in waits + reads:
            self.ended(now, peer, key, "lost")

    def extend(self, now: float, key: KvKey) -> None:
        """Somebody still wants the handle."""
        known = self.handles.get(key)
        if known is not None:
            known.extend(now)
            self._leases.set(key, known.deadline)

    # time

    def tick(self, now: float) -> None:
        """End what has waited for too long."""
        for key in self._leases.due(now):
            self._lease_over(now, self.handles[key])
        for key in self._patience.due(now):
            self._refuse(now, self.early.pop(key), f"was not offered on node {self._node}")

    def next_deadline(self) -> float | None:
        """The earliest end of a lease or a wait."""
        return min(
            (at for at in (self._leases.next(), self._patience.next()) if at is not None),
            default=None,
        )

    def listing(self, now: float) -> tuple[kv.HandleInfo, ...]:
        """The oldest ``MAX_LISTED`` handles."""
        return tuple(_info(one, now) for one in islice(self.handles.values(), MAX_LISTED))

    def counts(self) -> dict[str, int]:
        """Live handles by phase."""
        return dict(Counter(one.phase.value for one in self.handles.values()))

    def validate(self) -> None:
        """Phases, readers and deadlines agree."""
        assert len(self._leases) == len(self.handles)
        assert len(self._patience) == len(self.early)
        for key, one in self.handles.items():
            assert key == one.handle.key
            assert key in self._leases
            assert not one.ended
            assert (one.reader is None) == (one.phase is HandlePhase.READY) == (key not in self._reading)
            assert key not in self.early

    def _check(self, owner: str, handle: KvHandle, known: OfferedHandle | None) -> None:
        inspect(handle)
        if (handle.owner, handle.node) != (owner, self._node):
            raise ProtocolError(f"{owner} on {self._node} offers a handle of {handle.owner} on {handle.node}")
        if known is not None and known.handle.owner != owner:
            raise ProtocolError(f"{handle.key} is offered by {owner} and by {known.handle.owner}")
        if known is None and len(self.handles) >= MAX_HANDLES:
            raise Overloaded(f"the relay of {self._node} keeps {MAX_HANDLES} handles and takes no more")

    def _begin(self, now: float, known: OfferedHandle, ask: Ask) -> None:
        if known.phase is not HandlePhase.READY:
            self._refuse(now, ask, f"is {known.phase.value}, for {known.reader}")
        elif ask.expected is not None and ask.expected != known.handle:
            self._refuse(now, ask, f"is not the handle that {known.handle.owner} offers under that name")
        else:
            known.pull(now, ask.peer)
            self._leases.set(ask.key, known.deadline)
            self._reading[ask.key] = ask.readers
            ask.readers.granted(now, ask.peer, known.handle)

    def _hand_on(self, now: float, known: OfferedHandle) -> bool:
        """Let the successor read, if there is one and it wants to."""
        next_one, key = self.successor, known.handle.key
        if next_one is None or known.phase is not HandlePhase.PULLING or known.reader == next_one.name:
            return False
        if not next_one.takes(now, known.handle):
            return False
        known.hand_on(now, next_one.name)
        self._leases.set(key, known.deadline)
        self._reading[key] = next_one
        next_one.granted(now, next_one.name, known.handle)
        return True

    def _offered(self, owner: str, key: KvKey) -> OfferedHandle | None:
        known = self.handles.get(key)
        return known if known is not None and known.handle.owner == owner else None

    def _refuse(self, now: float, ask: Ask, why: str) -> None:
        ask.readers.failed(now, ask.peer, ask.key, TransferFailed(f"the KV of {ask.key} {why}").info())

    def _lease_over(self, now: float, known: OfferedHandle) -> None:
        reader, key = known.reader, known.handle.key
        # who reads on after a withdrawal was told nothing yet, who reads on after the lease was told then
        told = known.reason == "expired"
        known.lease_over(now)
        readers = self._reading.get(key)
        self._settle(known)
        if reader is not None and readers is not None and not told:
            error = TransferFailed(f"reading the KV of {key} took longer than its lease allows")
            readers.failed(now, reader, key, error.info())

    def _settle(self, known: OfferedHandle) -> None:
        key = known.handle.key
        if known.ended:
            self._remove(known)
            self._tell(known.handle.owner, kv.KvRelease(key, known.reason))
        else:
            self._leases.set(key, known.deadline)

    def _forget(self, now: float, known: OfferedHandle, error: TransferFailed) -> None:
        """End a handle whose owner needs no release; its reader is told."""
        reader, key = known.reader, known.handle.key
        readers = self._reading.get(key)
        self._remove(known)
        if reader is not None and readers is not None:
            readers.failed(now, reader, key, error.info())

    def _remove(self, known: OfferedHandle) -> None:
        key = known.handle.key
        del self.handles[key]
        self._reading.pop(key, None)
        self._leases.cancel(key)


def _info(one: OfferedHandle, now: float) -> kv.HandleInfo:
    handle = one.handle
    return kv.HandleInfo(
        key=handle.key,
        owner=handle.owner,
        reader=(one.reader or "").rpartition(":")[2],
        state=one.phase.value,
        nbytes=handle.nbytes,
        tokens=handle.tokens,
        age_s=now - one.offered_at,
        lease_left_s=max(0.0, one.deadline - now),
    )
