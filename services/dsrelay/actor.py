"""The relay machine on real sockets.

Sockets, first match wins: the router's backend; one connection to each relay that KV is fetched from; ``data``,
bound, for the relays that fetch from here; ``local``, bound, for the workers of the node. Beside them the stream
port, from which decode instances of other nodes read.
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
from dsrelay.config import RelayConfig
from dsrelay.copies import KeptMemory
from dsrelay.events import (
    FETCHER,
    RELAY,
    ROUTER,
    WORKER,
    CloseStream,
    Complain,
    CopyKept,
    KeptCopied,
    OpenProof,
    OpenStream,
    PathKnown,
    PoolProved,
    ProvePool,
    ProveStream,
    StreamProved,
)
from dsrelay.state import RelayState
from dsrelay.streams import PROOF_NBYTES, Streams, read_proof
from dstopology.resolved import LOCAL, Topology
from dstopology.wiring import router_route, system_keys
from dswire.actor import Actor, Route
from dswire.errors import DsError, ProtocolError
from dswire.keys import start_authenticator
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
        topology: Topology,
        streams: Streams | None = None,
        authenticator: ThreadAuthenticator | None = None,
    ) -> None:
        super().__init__(machine, routes)
        #: messages that were refused: unreadable, or against the protocol
        self.refused = 0
        self._topology = topology
        #: where KV leaves the node at all
        self._streams = streams
        self._kept = KeptMemory()
        self._authenticator = authenticator

    def started(self) -> None:
        """Say hello; the router's welcome makes us ready."""
        if self._streams is not None:
            self._streams.start()
        self.wake()

    def stopping(self) -> None:
        """Tell the router that this is on purpose."""
        self.send(ROUTER, worker.WorkerBye())

    def closed(self) -> None:
        """Remove the segments, stop the threads."""
        if self._streams is not None:
            self._streams.close()
        self._kept.close()
        if self._authenticator is not None:
            self._authenticator.stop()

    def garbage(self, peer: str, error: ProtocolError) -> None:
        """Count and log it; whoever sent it gets no answer."""
        self._complain(peer, error)

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsrelay.events``."""
        match action:
            case OpenStream() | CloseStream() | OpenProof():
                self._serve(action)
            case ProvePool(owner, pool):
                self.spawn(self._prove(owner, pool), "proof of a pool")
            case ProveStream(source, proof):
                self.spawn(self._read(source, proof), "proof of a stream")
            case CopyKept():
                self.spawn(self._copy(action), "copy")
            case PathKnown(path):
                _tell(path)
            case Complain(peer, error):
                self._complain(peer, error)
            case _:
                super().perform(action)

    def _serve(self, action: OpenStream | CloseStream | OpenProof) -> None:
        """Only relays that come by the data socket ask for streams, and where there is one there are streams."""
        assert self._streams is not None
        match action:
            case OpenStream(peer, handle, number):
                ticket = self._streams.ticket(handle)
                self._answer(peer, kv.KvFetchGranted(handle.key, ticket, number))
            case CloseStream(key):
                self._streams.revoke(key)
            case OpenProof(peer):
                self._answer(peer, kv.KvProof(self._streams.proof(peer), PROOF_NBYTES))

    def _answer(self, to: str, message: msgspec.Struct) -> None:
        lost: list[str] = []
        self._send(Send(to, message), lost)
        for peer in lost:
            self.soon(PeerLost(self.now(), peer))

    async def _prove(self, owner: str, pool: kv.PoolInfo) -> PoolProved:
        try:
            inspect_pool(pool.layout, pool.shards, pool.blocks)
            rate = await asyncio.to_thread(read_rate, pool.layout, pool.shards, pool.blocks)
        except DsError as error:
            return PoolProved(self.now(), owner, 0.0, error.info())
        return PoolProved(self.now(), owner, rate, None)

    async def _read(self, source: str, proof: kv.KvProof) -> StreamProved:
        relay = self._topology.relay_of(source)
        try:
            rate = await asyncio.to_thread(read_proof, relay.stream_connect, proof, relay.transfer_timeout_s)
        except DsError as error:
            return StreamProved(self.now(), source, 0.0, error.info())
        return StreamProved(self.now(), source, rate, None)

    async def _copy(self, action: CopyKept) -> KeptCopied:
        key = action.kept.key
        error = await self._kept.keep(action)
        if error is not None:
            log.warning("KV cannot be kept", handle=str(key), why=error.message)
        return KeptCopied(self.now(), key, error)

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


def configure(topology: Topology, name: str) -> RelayConfig:
    """What the machine of the relay ``name`` must know."""
    relay = topology.relay(name)
    return RelayConfig(
        name=name,
        node=relay.node,
        incarnation=uuid.uuid4().hex[:12],
        lease_s=relay.lease_s,
        transfer_timeout_s=relay.transfer_timeout_s,
        sources=topology.sources_of(relay.node),
        direct="decode" in topology.roles_on(relay.node) and topology.transport(relay.node, relay.node) in LOCAL,
        collective=topology.collective,
        prove=True,
        verify=relay.verify,
        keep=str(relay.keep),
        keep_nbytes=relay.keep_nbytes,
    )


def _routes(topology: Topology, config: RelayConfig, routes: list[Route]) -> None:
    """Add the sockets to ``routes``, one by one, so that the caller can close those that were opened."""
    relay, keys = topology.relay(config.name), system_keys(topology)
    routes.append(router_route(topology, config.name, config.incarnation))
    for node in config.sources:
        endpoint = topology.relay_of(node).data_connect
        assert endpoint is not None, "sources_of() names only nodes that have one"
        socket = ConnectedSocket(endpoint, config.name, keys=keys)
        routes.append(Route(socket, kv.ToFetcher, peer=RELAY + node))
    if relay.data_bind is not None:
        routes.append(Route(BoundSocket(relay.data_bind, keys=keys), kv.FromFetcher, prefix=FETCHER))
    routes.append(Route(BoundSocket(relay.local, keys=keys), kv.FromKvWorker, prefix=WORKER))


def _close(routes: Sequence[Route]) -> None:
    for route in routes:
        route.socket.close()


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> RelayActor:
    """Wire the relay ``name``."""
    phase("opening sockets")
    config, relay = configure(topology, name), topology.relay(name)
    routes: list[Route] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_close, routes)
        authenticator = start_authenticator(topology.security.keys_dir) if topology.security.encrypted else None
        if authenticator is not None:
            stack.callback(authenticator.stop)
        _routes(topology, config, routes)
        streams = None
        if relay.stream_bind is not None:
            sealed = topology.security.encrypted
            streams = Streams(relay.stream_bind, relay.streams, relay.transfer_timeout_s, sealed=sealed)
        stack.pop_all()
    return RelayActor(RelayState(config), routes, topology, streams, authenticator)
