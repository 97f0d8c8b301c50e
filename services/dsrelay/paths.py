"""By which way KV comes to this node from each of its sources, proved with a small transfer before it is needed.

A source is an owner of this node, whose pool is mapped and read, or the relay of another node (our own too, where
KV that stays on the node goes by TCP), which is asked for one slot's bytes: first a few, so that the connection
is there, then all, against the clock. A path that cannot be used is told with the reason, and so is the one that
stands in for it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsrelay.events import RELAY, Action, PathKnown, ProofArrived, ProvePool
from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.messages import kv

#: bytes of the probe that only asks whether anybody is there
FIRST_NBYTES = 64


@dataclass(slots=True)
class _Asked:
    at: float
    nbytes: int


class Paths:
    """Every path to this node."""

    def __init__(self, node: str, slot_nbytes: int, out: list[Action]) -> None:
        self.known: dict[str, kv.PathInfo] = {}
        #: sources that were asked for bytes
        self._asked: dict[str, _Asked] = {}
        self._node = node
        self._slot_nbytes = slot_nbytes
        self._out = out

    # other relays

    def ask(self, now: float, source: str) -> None:
        """A connection to the relay of that node begins, or begins anew."""
        self.known[source] = kv.PathInfo(source, "tcp")
        self._probe(now, source, FIRST_NBYTES)

    def arrived(self, event: ProofArrived) -> None:
        """Bytes that were asked for have come. Those that nobody asked for prove nothing."""
        source = event.peer.removeprefix(RELAY)
        asked = self._asked.pop(source, None)
        if asked is None or asked.nbytes != event.nbytes:
            return
        if asked.nbytes == FIRST_NBYTES:
            self._probe(event.now, source, max(FIRST_NBYTES + 1, self._slot_nbytes))
        else:
            seconds = max(event.now - asked.at, 1e-9)
            self._tell(kv.PathInfo(source, "tcp", event.nbytes / seconds))

    def lost(self, source: str, error: ErrorInfo) -> None:
        """That relay cannot be reached."""
        self._asked.pop(source, None)
        self._tell(kv.PathInfo(source, "tcp", reason=error.message))

    # owners of this node

    def map(self, owner: str, pool: kv.PoolInfo) -> None:
        """An owner has said where its pool is."""
        self.known[owner] = kv.PathInfo(owner, "shm")
        self._out.append(ProvePool(owner, pool))

    def mapped(self, owner: str, bytes_per_s: float, error: ErrorInfo | None, *, stand_in: bool) -> None:
        """Its pool was read, or cannot be; ``stand_in``: then its KV goes by TCP."""
        if owner not in self.known:
            return
        if error is None:
            self._tell(kv.PathInfo(owner, "shm", bytes_per_s))
        else:
            self._tell(kv.PathInfo(owner, "tcp" if stand_in else "shm", reason=error.message))

    def forget(self, owner: str) -> None:
        """The owner is gone."""
        self.known.pop(owner, None)

    def direct(self, owner: str) -> bool:
        """Whether its pool can be read straight, as far as is known."""
        path = self.known.get(owner)
        return path is None or not path.reason

    def _probe(self, now: float, source: str, nbytes: int) -> None:
        self._asked[source] = _Asked(now, nbytes)
        self._out.append(Send(RELAY + source, kv.KvProbe(nbytes)))

    def _tell(self, path: kv.PathInfo) -> None:
        self.known[path.source] = path
        self._out.append(PathKnown(path))
