"""The life of an offered KV handle, as the relay of its owner's node keeps it.

    READY ──> PULLING ──> RELEASED
      │          │            ^
      │          └─> QUARANTINED      withdrawn, or its lease over, while somebody reads the blocks
      ├─────────────────> RELEASED    withdrawn while nobody does
      └─> EXPIRED                     its lease over, nobody came

RESERVED and FILLING come before the offer and are the owner's alone. RELEASED and EXPIRED are ends: ``reason``
then is what the owner is told. A quarantine has a hard bound: one lease after a withdrawal, ``GRACE_S`` after a
lease that was over, since its reader is told to stop and any torn read is caught by the checksum. So a handle
outlives its withdrawal by one lease at most, and the last sign of interest in it by a lease and ``GRACE_S``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from dskv.handle import KvHandle
from dswire.lifecycle import Lifecycle

#: seconds that a reader has to hear that its lease is over
GRACE_S = 0.5


class HandlePhase(Enum):
    """Where an offered handle stands."""

    READY = "ready"
    PULLING = "pulling"
    QUARANTINED = "quarantined"
    RELEASED = "released"
    EXPIRED = "expired"


TRANSITIONS: Mapping[HandlePhase, frozenset[HandlePhase]] = {
    HandlePhase.READY: frozenset({HandlePhase.PULLING, HandlePhase.RELEASED, HandlePhase.EXPIRED}),
    HandlePhase.PULLING: frozenset({HandlePhase.RELEASED, HandlePhase.QUARANTINED}),
    HandlePhase.QUARANTINED: frozenset({HandlePhase.RELEASED}),
    HandlePhase.RELEASED: frozenset(),
    HandlePhase.EXPIRED: frozenset(),
}

#: phases after which nothing more happens
ENDS = frozenset({HandlePhase.RELEASED, HandlePhase.EXPIRED})


class OfferedHandle:
    """One handle, its phase, lease and reader. Invariant: it has a reader in PULLING and QUARANTINED only."""

    __slots__ = ("deadline", "handle", "lease_s", "life", "offered_at", "reader", "reason")

    def __init__(self, handle: KvHandle, now: float, lease_s: float) -> None:
        self.handle = handle
        self.life = Lifecycle(f"handle {handle.key}", TRANSITIONS, HandlePhase.READY, now)
        self.lease_s = lease_s
        self.offered_at = now
        #: when the lease is over, or in quarantine its hard bound
        self.deadline = now + lease_s
        #: who reads the blocks
        self.reader: str | None = None
        #: "pulled", "withdrawn", "aborted", "expired" or "lost"; "" until that is clear
        self.reason = ""

    @property
    def phase(self) -> HandlePhase:
        """Where it stands."""
        return self.life.phase

    @property
    def ended(self) -> bool:
        """Whether the owner may have its blocks back."""
        return self.life.phase in ENDS

    def extend(self, now: float) -> None:
        """The lease begins anew; of no effect in quarantine."""
        if self.phase in (HandlePhase.READY, HandlePhase.PULLING):
            self.deadline = now + self.lease_s

    def pull(self, now: float, reader: str) -> None:
        """``reader`` begins to read. Raises ``IllegalTransition`` unless READY."""
        self.life.move(HandlePhase.PULLING, now, f"pulled by {reader}")
        self.reader = reader

    def hand_on(self, now: float, reader: str) -> None:
        """The reader has it all; another one begins to read in its place."""
        assert self.phase is HandlePhase.PULLING, self.life.tell()
        self.reader = reader
        self.deadline = now + self.lease_s

    def withdraw(self, now: float) -> None:
        """The owner wants its blocks back: at once when nobody reads them, else when that ends."""
        if self.phase is HandlePhase.READY:
            self._end(HandlePhase.RELEASED, now, "withdrawn")
        elif self.phase is HandlePhase.PULLING:
            self._quarantine(now, "withdrawn", self.lease_s)

    def read_ended(self, now: float, reason: str) -> None:
        """The reader has ended: ``reason`` is "pulled", "aborted" or "lost"; a quarantine keeps its own."""
        self._end(HandlePhase.RELEASED, now, self.reason or reason)

    def lease_over(self, now: float) -> None:
        """``deadline`` has come."""
        if self.phase is HandlePhase.READY:
            self._end(HandlePhase.EXPIRED, now, "expired")
        elif self.phase is HandlePhase.PULLING:
            self._quarantine(now, "expired", min(GRACE_S, self.lease_s))
        else:
            self._end(HandlePhase.RELEASED, now, self.reason)

    def _quarantine(self, now: float, reason: str, bound_s: float) -> None:
        self.life.move(HandlePhase.QUARANTINED, now, reason)
        self.reason = reason
        self.deadline = now + bound_s

    def _end(self, phase: HandlePhase, now: float, reason: str) -> None:
        self.life.move(phase, now, reason)
        self.reason = reason
        self.reader = None
