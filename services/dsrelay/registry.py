"""Who is registered with this relay: the workers of its node, and the relays that fetch from it.

A worker is pinged every ``PING_S`` and is lost when it was silent for ``SILENCE_S``, or for a lease where that is
shorter; relays say nothing while
nothing is fetched, and are known to be gone when a message to them cannot be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsrelay.events import WORKER, Action
from dswire.errors import DsError, ErrorInfo, Overloaded, ProtocolError, VersionMismatch
from dswire.machine import Send
from dswire.messages import PROTOCOL, kv

PING_S = 1.0
SILENCE_S = 5.0
#: registered at once, of each kind
MAX_PEERS = 1_024


def _wrong_version(name: str, protocol: int) -> VersionMismatch:
    return VersionMismatch(f"{name} speaks protocol {protocol}, this relay speaks {PROTOCOL}")


@dataclass(slots=True)
class Worker:
    """A registered worker."""

    incarnation: str
    #: when anything came from it last
    heard: float


class Workers:
    """The registered workers of this node, by the machine's name for them."""

    def __init__(self, lease_s: float, out: list[Action]) -> None:
        self.known: dict[str, Worker] = {}
        self._silence_s = min(SILENCE_S, lease_s)
        self._ping_at: float | None = None
        self._out = out

    def refusal(self, peer: str, hello: kv.KvHello) -> DsError | None:
        """Why this worker cannot be registered; None when it can."""
        if hello.protocol != PROTOCOL:
            return _wrong_version(hello.name, hello.protocol)
        if WORKER + hello.name != peer:
            return ProtocolError(f"{hello.name!r} says hello on the connection of {peer.removeprefix(WORKER)!r}")
        if peer not in self.known and len(self.known) >= MAX_PEERS:
            return Overloaded(f"{MAX_PEERS} workers are registered")
        return None

    def join(self, now: float, peer: str, incarnation: str) -> bool:
        """Register; returns whether another process had the name until now."""
        known = self.known.get(peer)
        self.known[peer] = Worker(incarnation, now)
        if self._ping_at is None:
            self._ping_at = now + PING_S
        return known is not None and known.incarnation != incarnation

    def heard(self, now: float, peer: str) -> bool:
        """Note a sign of life; returns whether the worker is registered."""
        known = self.known.get(peer)
        if known is not None:
            known.heard = now
        return known is not None

    def name_of(self, peer: str) -> str:
        """A name that no other process has, nor had: that of a communicator's side."""
        return f"{peer.removeprefix(WORKER)}/{self.known[peer].incarnation}"

    def leave(self, peer: str) -> bool:
        """Strike off; returns whether it was registered."""
        return self.known.pop(peer, None) is not None

    def tick(self, now: float, lost: Callable[[float, str], None]) -> None:
        """Ping; call ``lost`` for those that were silent."""
        if self._ping_at is None or now < self._ping_at:
            return
        for peer in [peer for peer, one in self.known.items() if now - one.heard >= self._silence_s]:
            lost(now, peer)
        self._out += [Send(peer, kv.KvPing()) for peer in self.known]
        self._ping_at = now + PING_S if self.known else None

    def next_deadline(self) -> float | None:
        """The next ping."""
        return self._ping_at


class Fetchers:
    """The relays that may fetch, by the machine's name for them."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        #: said hello and cannot be served
        self.refused: dict[str, ErrorInfo] = {}

    def join(self, peer: str, hello: kv.RelayHello) -> bool:
        """Register or refuse; returns whether another process had the name until now."""
        had = self.known.pop(peer, None)
        self.refused.pop(peer, None)
        if hello.protocol != PROTOCOL:
            self._room(self.refused)
            self.refused[peer] = _wrong_version(hello.name, hello.protocol).info()
        else:
            self._room(self.known)
            self.known[peer] = hello.incarnation
        return had is not None and had != hello.incarnation

    def leave(self, peer: str) -> None:
        """Strike off."""
        self.known.pop(peer, None)

    @staticmethod
    def _room(table: dict[str, str] | dict[str, ErrorInfo]) -> None:
        # the longest-known goes; should it still live, it is asked for another hello
        if len(table) >= MAX_PEERS:
            del table[next(iter(table))]
