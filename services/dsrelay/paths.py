"""By which way KV comes to this node from each of its sources, proved with a small transfer before it is needed.

A source is an owner of this node, whose pool is mapped and read, or the relay of another node (our own too, where
KV that stays on the node goes by TCP), which is asked for a ticket for some bytes. A path that cannot be used is
told with the reason. Pure.
"""

from __future__ import annotations

from dsrelay.events import RELAY, Action, PathKnown, ProvePool, ProveStream
from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.messages import kv


class Paths:
    """Every path to this node."""

    def __init__(self, out: list[Action]) -> None:
        self.known: dict[str, kv.PathInfo] = {}
        #: sources that were asked for a ticket
        self._asked: set[str] = set()
        self._out = out

    # other relays

    def ask(self, source: str) -> None:
        """A connection to the relay of that node begins, or begins anew."""
        self.known[source] = kv.PathInfo(source, "tcp")
        self._asked.add(source)
        self._out.append(Send(RELAY + source, kv.KvProbe()))

    def answered(self, source: str, proof: kv.KvProof) -> None:
        """The ticket. One that nobody asked for proves nothing."""
        if source in self._asked:
            self._asked.discard(source)
            self._out.append(ProveStream(source, proof))

    def streamed(self, source: str, bytes_per_s: float, error: ErrorInfo | None) -> None:
        """The bytes have come, or cannot."""
        if error is None:
            self._tell(kv.PathInfo(source, "tcp", bytes_per_s))
        else:
            self._tell(kv.PathInfo(source, "tcp", reason=error.message))

    def lost(self, source: str, error: ErrorInfo) -> None:
        """That relay cannot be reached."""
        self._asked.discard(source)
        self._tell(kv.PathInfo(source, "tcp", reason=error.message))

    # owners of this node

    def map(self, owner: str, pool: kv.PoolInfo) -> None:
        """An owner has said where its pool is."""
        self.known[owner] = kv.PathInfo(owner, "shm")
        self._out.append(ProvePool(owner, pool))

    def mapped(self, owner: str, bytes_per_s: float, error: ErrorInfo | None) -> None:
        """Its pool was read, or cannot be."""
        if owner not in self.known:
            return
        if error is None:
            self._tell(kv.PathInfo(owner, "shm", bytes_per_s))
        else:
            self._tell(kv.PathInfo(owner, "shm", reason=error.message))

    def forget(self, owner: str) -> None:
        """The owner is gone."""
        self.known.pop(owner, None)

    def _tell(self, path: kv.PathInfo) -> None:
        self.known[path.source] = path
        self._out.append(PathKnown(path))
