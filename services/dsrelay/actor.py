"""The relay machine on real sockets and a real staging segment.

Sockets, first match wins: the router's backend; one connection to each relay that KV is fetched from; ``data``,
bound, for the relays that fetch from here; ``local``, bound, for the workers of the node. The bytes of a chunk
are copied once on either side: by libzmq on sending, into the slot on arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog
from zmq.auth.thread import ThreadAuthenticator

from dskv.inspection import inspect_pool
from dskv.memory import read_rate
from dskv.segment import Segment
from dskv.staging import halves
from dsrelay.config import RelayConfig
from dsrelay.copies import KeptMemory
from dsrelay.events import (
    FETCHER,
    RELAY,
    ROUTER,
    WORKER,
    ChunkArrived,
    Complain,
    CopyKept,
    KeptCopied,
    KeptStaged,
    PathKnown,
    PoolProved,
    ProofArrived,
    ProvePool,
    SendChunk,
    SendProof,
    StageKept,
    StoreChunk,
)
from dsrelay.state import RelayState
from dstopology.resolved import Topology
from dstopology.wiring import router_route, system_keys
from dswire import heap
from dswire.actor import Actor, Route
from dswire.codec import MAX_FRAME_NBYTES
from dswire.errors import DsError, ProtocolError, from_info
from dswire.keys import start_authenticator
from dswire.links import End, Ready
from dswire.machine import PeerLost, Send
from dswire.messages import kv, worker
from dswire.sockets import BoundSocket, ConnectedSocket

log = structlog.get_logger()


class RelayActor(Actor):
    """Performs what the machine asks for."""

    machine: RelayState

    def __init__(
        self,
        machine: RelayState,
        routes: list[Route],
        staging: Segment,
        authenticator: ThreadAuthenticator | None = None,
    ) -> None:
        super().__init__(machine, routes)
        #: messages that were refused: unreadable, or against the protocol
        self.refused = 0
        self._staging = staging
        self._kept = KeptMemory()
        self._authenticator = authenticator
        #: raw frames of the chunk at hand
        self._frames: Sequence[bytes] = ()

    def started(self) -> None:
        """Say hello; the router's welcome makes us ready."""
        self.wake()

    def stopping(self) -> None:
        """Tell the router that this is on purpose."""
        self.send(ROUTER, worker.WorkerBye())

    def closed(self) -> None:
        """Remove the segments, stop the threads."""
        self._kept.close()
        self._staging.close()
        if self._authenticator is not None:
            self._authenticator.stop()

    def received(self, peer: str, message: msgspec.Struct, frames: Sequence[bytes]) -> None:
        """A chunk or a proof comes with one raw frame, anything else with none."""
        if isinstance(message, kv.KvProof):
            self.feed(ProofArrived(self.now(), peer, len(frames[0]) if len(frames) == 1 else 0))
            return
        if not isinstance(message, kv.KvChunk):
            super().received(peer, message, frames)
            return
        self._frames = frames
        nbytes = len(frames[0]) if len(frames) == 1 else 0
        self.feed(ChunkArrived(self.now(), peer, message.key, message.chunk, nbytes, message.number))
        self._frames = ()

    def garbage(self, peer: str, error: ProtocolError) -> None:
        """Count and log it; whoever sent it gets no answer."""
        self._complain(peer, error)

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsrelay.events``."""
        match action:
            case StoreChunk(slot):
                frame = self._frames[0]
                self._staging.slot(slot)[: len(frame)] = frame
            case SendChunk():
                self._send_bulk(action.peer, action.message, self._staging.slot(action.slot)[: action.nbytes])
            case SendProof(peer, nbytes):
                self._send_bulk(peer, kv.KvProof(), self._staging.slot(0)[:nbytes])
            case ProvePool(owner, pool):
                self.spawn(self._prove(owner, pool), "proof of a pool")
            case CopyKept() | StageKept():
                self.spawn(self._copy(action), "copy")
            case PathKnown(path):
                _tell(path)
            case Complain(peer, error):
                self._complain(peer, error)
            case Ready():
                self.ready()
            case End(error):
                self.finish(from_info(error))
            case _:
                super().perform(action)

    def _send_bulk(self, to: str, message: msgspec.Struct, frame: memoryview) -> None:
        lost: list[str] = []
        self._send(Send(to, message), [frame], lost)
        for peer in lost:
            self.soon(PeerLost(self.now(), peer))

    async def _prove(self, owner: str, pool: kv.PoolInfo) -> PoolProved:
        try:
            inspect_pool(pool.layout, pool.shards, pool.blocks)
            rate = await asyncio.to_thread(read_rate, pool.layout, pool.shards, pool.blocks)
        except DsError as error:
            return PoolProved(self.now(), owner, 0.0, error.info())
        return PoolProved(self.now(), owner, rate, None)

    async def _copy(self, action: CopyKept | StageKept) -> KeptCopied | KeptStaged | None:
        key = action.kept.key
        if isinstance(action, CopyKept):
            error = await self._kept.keep(action)
        else:
            error = await self._kept.stage(action, self._staging.slot(action.slot))
        if error is not None:
            log.warning("kept KV cannot be copied", handle=str(key), why=error.message)
        if isinstance(action, CopyKept):
            return KeptCopied(self.now(), key, error)
        # a transfer of which nothing more comes is ended
        return KeptStaged(self.now(), key, action.chunk) if error is None else None

    def _complain(self, peer: str, error: DsError) -> None:
        self.refused += 1
        # a stranger chooses its own identity: it may hold what no terminal or file can show
        log.warning("message refused", peer=ascii(peer), code=error.code, error=ascii(error.message))


def _tell(path: kv.PathInfo) -> None:
    if path.reason:
        log.warning("a path for KV cannot be used", source=path.source, used=path.transport, why=path.reason)
    else:
        rate = f"{(path.bytes_per_s or 0.0) / 1e9:.2f} GB/s"
        log.info("path for KV", source=path.source, transport=path.transport, rate=rate)


def sources_of(topology: Topology, node: str) -> tuple[str, ...]:
    """Nodes whose KV comes to ``node`` by TCP: those of owners, where this one has a reader."""
    if "decode" not in _roles(topology, node):
        return ()
    reachable = (relay.node for relay in topology.relays if relay.data_connect is not None)
    owners = (other for other in reachable if "prefill" in _roles(topology, other))
    return tuple(other for other in owners if topology.transport(other, node) == "tcp")


def _roles(topology: Topology, node: str) -> set[str]:
    return {instance.role for instance in topology.instances if instance.node == node}


def configure(topology: Topology, name: str) -> RelayConfig:
    """What the machine of the relay ``name`` must know. Raises :class:`BadInput` for staging that is too small."""
    relay = topology.relay(name)
    sources = sources_of(topology, relay.node)
    # where nothing goes by TCP the staging is never used: then do not ask the host for all of it
    sends = any(relay.node in sources_of(topology, other.node) for other in topology.relays)
    nbytes = relay.staging_nbytes if sources or sends else 2 * relay.slot_nbytes
    sending, receiving = halves(nbytes, relay.slot_nbytes)
    return RelayConfig(
        name=name,
        node=relay.node,
        incarnation=uuid.uuid4().hex[:12],
        staging=str(relay.staging),
        sending_slots=sending,
        receiving_slots=receiving,
        slot_nbytes=relay.slot_nbytes,
        lease_s=relay.lease_s,
        transfer_timeout_s=relay.transfer_timeout_s,
        sources=sources,
        direct="decode" in _roles(topology, relay.node) and topology.transport(relay.node, relay.node) == "shm",
        prove=True,
        verify=relay.verify,
        keep=str(relay.keep),
        keep_nbytes=relay.keep_nbytes,
    )


def _routes(topology: Topology, config: RelayConfig, routes: list[Route]) -> None:
    """Add the sockets to ``routes``, one by one, so that the caller can close those that were opened."""
    relay, keys = topology.relay(config.name), system_keys(topology)
    limit = max(MAX_FRAME_NBYTES, config.slot_nbytes)
    routes.append(router_route(topology, config.name, config.incarnation))
    for node in config.sources:
        endpoint = topology.relay_of(node).data_connect
        assert endpoint is not None, "sources_of() names only nodes that have one"
        socket = ConnectedSocket(endpoint, config.name, keys=keys, max_nbytes=limit, bulk=True)
        routes.append(Route(socket, kv.ToFetcher, peer=RELAY + node))
    if relay.data_bind is not None:
        routes.append(Route(BoundSocket(relay.data_bind, keys=keys), kv.FromFetcher, prefix=FETCHER))
    routes.append(Route(BoundSocket(relay.local, keys=keys), kv.FromKvWorker, prefix=WORKER))


def _close(routes: Sequence[Route]) -> None:
    for route in routes:
        route.socket.close()


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> RelayActor:
    """Wire the relay ``name``."""
    phase("mapping staging memory")
    config, relay = configure(topology, name), topology.relay(name)
    slots = config.sending_slots + config.receiving_slots
    heap.keep(slots * config.slot_nbytes)
    routes: list[Route] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_close, routes)
        authenticator = start_authenticator(topology.security.keys_dir) if topology.security.encrypted else None
        if authenticator is not None:
            stack.callback(authenticator.stop)
        _routes(topology, config, routes)
        staging = Segment.create(relay.staging, slots, config.slot_nbytes)
        if config.sources:
            staging.warm()
        stack.pop_all()
    return RelayActor(RelayState(config), routes, staging, authenticator)
