"""By which way KV comes to this node from each of its sources, proved with a small transfer before it is needed.

A source is an owner of this node, whose pool is mapped and read (by the readers, if it is a GPU's), or the relay of
another node (our own too, where KV that stays on the node goes by TCP), which is asked for a ticket for some bytes.
Where KV goes by communicators it is an owner of any node, whose relay is asked for a meeting with each reader. A
path that cannot be used is told with the reason. Pure.
"""

from __future__ import annotations

from dsrelay.events import RELAY, WORKER, Action, PathKnown, ProvePool, ProveStream
from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.messages import kv


class Paths:
    """Every path to this node."""

    def __init__(self, out: list[Action], collective: str = "") -> None:
        """``collective``: the communicators that KV goes by, if it does."""
        self.known: dict[str, kv.PathInfo] = {}
        #: sources that were asked for a ticket, or for meetings
        self._asked: set[str] = set()
        #: what each reader has found of an owner that readers try
        self._tried: dict[str, dict[str, kv.PathInfo]] = {}
        self._collective = collective
        #: owners whose pools only readers can open, and the readers, in the order in which they came
        self._gpus: dict[str, kv.PoolInfo] = {}
        self._readers: dict[str, None] = {}
        self._out = out

    # other relays

    def ask(self, source: str) -> None:
        """A connection to the relay of that node begins, or begins anew."""
        self._asked.add(source)
        if self._collective:
            for reader in self._readers:
                self._probe(source, reader)
            return
        self.known[source] = kv.PathInfo(source, "tcp")
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

    def met(self, source: str, met: kv.KvMet) -> None:
        """Where one of our readers meets an owner of that node. What nobody asked for proves nothing."""
        reader = WORKER + met.reader
        if not self._collective or source not in self._asked or reader not in self._readers:
            return
        self.known.setdefault(met.owner, kv.PathInfo(met.owner, self._collective))
        self._tried.setdefault(met.owner, {}).pop(reader, None)
        if met.error is None:
            self._out.append(Send(reader, kv.KvTry(met.owner, meeting=met.meeting)))
        else:
            self.tried(reader, kv.KvTried(met.owner, error=met.error))

    def lost(self, source: str, error: ErrorInfo) -> None:
        """That relay cannot be reached."""
        if not self._collective:
            self._asked.discard(source)
            self._tell(kv.PathInfo(source, "tcp", reason=error.message))

    # owners and readers of this node

    def map(self, owner: str, pool: kv.PoolInfo) -> None:
        """An owner has said where its pool is. One on a GPU is read by the readers, who alone can open it."""
        if all(shard.gpu is None for shard in pool.shards):
            self.known[owner] = kv.PathInfo(owner, "shm")
            self._out.append(ProvePool(owner, pool))
            return
        self.known[owner] = kv.PathInfo(owner, "cuda_ipc")
        self._gpus[owner] = pool
        self._tried[owner] = {}
        for reader in self._readers:
            self._out.append(Send(reader, kv.KvTry(owner, pool)))

    def welcome(self, reader: str) -> None:
        """A reader has said hello."""
        self._readers[reader] = None
        for owner, pool in self._gpus.items():
            self._out.append(Send(reader, kv.KvTry(owner, pool)))
        if self._collective:
            for source in self._asked:
                self._probe(source, reader)

    def tried(self, reader: str, tried: kv.KvTried) -> None:
        """A reader has read from an owner, or cannot; the one who found it worst is what is told of all."""
        known, results = self.known.get(tried.owner), self._tried.get(tried.owner)
        if known is None or results is None or reader not in self._readers:
            return
        reason = tried.error.message if tried.error is not None else ""
        rate = None if reason else tried.bytes_per_s
        results[reader] = kv.PathInfo(tried.owner, known.transport, rate, reason)
        worst = min(results.values(), key=lambda path: (not path.reason, path.bytes_per_s or 0.0))
        if worst != known:
            self._tell(worst)

    def mapped(self, owner: str, bytes_per_s: float, error: ErrorInfo | None) -> None:
        """Its pool was read, or cannot be."""
        if owner not in self.known:
            return
        if error is None:
            self._tell(kv.PathInfo(owner, "shm", bytes_per_s))
        else:
            self._tell(kv.PathInfo(owner, "shm", reason=error.message))

    def forget(self, peer: str) -> None:
        """A worker of this node is gone."""
        owner = peer.removeprefix(WORKER)
        self.known.pop(owner, None)
        self._gpus.pop(owner, None)
        self._tried.pop(owner, None)
        self._readers.pop(peer, None)
        for results in self._tried.values():
            results.pop(peer, None)

    def _probe(self, source: str, reader: str) -> None:
        self._out.append(Send(RELAY + source, kv.KvProbe(reader.removeprefix(WORKER))))

    def _tell(self, path: kv.PathInfo) -> None:
        self.known[path.source] = path
        self._out.append(PathKnown(path))
