"""The stream port of a relay: whoever brings a valid ticket gets the KV that it is for, and nobody anything else.

Connections are taken on the event loop, and have ``TOKEN_S`` to bring a token; then one of a few threads sends
straight out of the owner's mapped pool, so many streams at once and the others in turn. Invariants: a ticket is
good for one connection; a revoked one for none, and its stream ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from dskv import stream
from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools
from dskv.segment import SegmentCache
from dskv.stream import Stream
from dstopology.endpoints import Tcp
from dswire.errors import PortInUse, TransferFailed
from dswire.messages.kv import KvProof, Ticket

log = structlog.get_logger()

#: seconds in which a connection must bring its token
TOKEN_S = 2.0
#: connections at once that have brought none
MAX_STRANGERS = 256
#: read to prove a path
PROOF_NBYTES = 4 << 20


@dataclass(slots=True)
class _Offer:
    ticket: Ticket
    #: sends everything by that connection
    send: Callable[[socket.socket], None]
    connection: socket.socket | None = None


@dataclass(slots=True)
class _Stranger:
    token: bytes
    patience: asyncio.TimerHandle


class Streams:
    """Tickets and the threads that honour them."""

    def __init__(self, address: Tcp, count: int, timeout_s: float, *, sealed: bool) -> None:
        """Listen at ``address``; ``count`` streams at once. Raises :class:`PortInUse`.

        ``timeout_s``: how long a reader may take nothing; ``sealed``: encrypt.
        """
        try:
            self._listener = socket.create_server((address.host, address.port), backlog=MAX_STRANGERS)
        except OSError as error:
            raise PortInUse(f"cannot listen at {address}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._timeout_s = timeout_s
        self._sealed = sealed
        self._offers: dict[bytes, _Offer] = {}
        #: what is offered now, by handle or by who wants a proof
        self._tokens: dict[KvKey | str, bytes] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="stream")
        self._active: set[Future[None]] = set()
        #: a thread's own mappings: none is closed by another in the middle of a stream
        self._local = threading.local()
        self._caches: list[SegmentCache] = []

    def start(self) -> None:
        """Begin to take connections, on the loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._accept)

    def ticket(self, handle: KvHandle) -> Ticket:
        """A ticket for the KV of ``handle``; an earlier one is void."""

        def send(connection: socket.socket) -> None:
            pools = RankPools.map(handle.layout, handle.shards, handle.segment_blocks, self._cache())
            stream.send(connection, ticket.secret, pools, handle.blocks)

        ticket = self._offer(handle.key, send)
        return ticket

    def proof(self, peer: str) -> Ticket:
        """A ticket for ``PROOF_NBYTES`` bytes of nothing in particular; an earlier one of ``peer`` is void."""

        def send(connection: socket.socket) -> None:
            data = memoryview(bytes(PROOF_NBYTES))
            if ticket.secret:
                stream.send_sealed(connection, ticket.secret, [data])
            else:
                connection.sendall(data)

        ticket = self._offer(peer, send)
        return ticket

    def revoke(self, name: KvKey | str) -> None:
        """The ticket is void, and its stream ends."""
        token = self._tokens.pop(name, None)
        offer = self._offers.pop(token, None) if token is not None else None
        if offer is not None and offer.connection is not None:
            with contextlib.suppress(OSError):
                offer.connection.shutdown(socket.SHUT_RDWR)

    @property
    def active(self) -> int:
        """Streams that are sent, or wait for a thread."""
        return len(self._active)

    def close(self) -> None:
        """End all streams, and the threads."""
        loop = getattr(self, "_loop", None)
        if loop is not None:
            loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._strangers):
            self._dismiss(connection)
        for name in list(self._tokens):
            self.revoke(name)
        self._threads.shutdown()
        for cache in self._caches:
            cache.close()

    def _offer(self, name: KvKey | str, send: Callable[[socket.socket], None]) -> Ticket:
        self.revoke(name)
        secret = secrets.token_bytes(stream.SECRET_NBYTES) if self._sealed else b""
        ticket = Ticket(secrets.token_bytes(stream.TOKEN_NBYTES), secret)
        self._offers[ticket.token] = _Offer(ticket, send)
        self._tokens[name] = ticket.token
        return ticket

    # connections

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # gone before we looked, or no descriptor is free: whoever wants KV tries again
            return
        if len(self._strangers) >= MAX_STRANGERS:
            connection.close()
            return
        connection.setblocking(False)
        patience = self._loop.call_later(TOKEN_S, self._dismiss, connection)
        self._strangers[connection] = _Stranger(b"", patience)
        self._loop.add_reader(connection, self._listen, connection)

    def _listen(self, connection: socket.socket) -> None:
        """Bytes of a token have come."""
        stranger = self._strangers[connection]
        try:
            come = connection.recv(stream.TOKEN_NBYTES - len(stranger.token))
        except BlockingIOError:
            return
        except OSError:
            come = b""
        stranger.token += come
        if not come:
            self._dismiss(connection)
        elif len(stranger.token) == stream.TOKEN_NBYTES:
            self._admit(connection, stranger)

    def _admit(self, connection: socket.socket, stranger: _Stranger) -> None:
        offer = self._offers.get(stranger.token)
        if offer is None or offer.connection is not None:
            log.warning("a stream was asked for without a valid ticket")
            self._dismiss(connection)
            return
        self._forget(connection)
        offer.connection = connection
        sending = self._threads.submit(self._send, offer, connection)
        self._active.add(sending)
        sending.add_done_callback(self._active.discard)

    def _dismiss(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        stranger = self._strangers.pop(connection, None)
        if stranger is not None:
            stranger.patience.cancel()
            self._loop.remove_reader(connection)

    # threads

    def _send(self, offer: _Offer, connection: socket.socket) -> None:
        with connection:
            try:
                stream.bound(connection, self._timeout_s)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                offer.send(connection)
            except BlockingIOError:
                log.warning("a stream ended early", why=f"its reader took nothing for {self._timeout_s:g} s")
            except (OSError, TransferFailed) as error:
                # the reader sees the stream end, and says so; a revoked one is no news at all
                log.info("a stream ended early", why=str(error))

    def _cache(self) -> SegmentCache:
        cache: SegmentCache | None = getattr(self._local, "cache", None)
        if cache is None:
            cache = self._local.cache = SegmentCache()
            self._caches.append(cache)
        return cache


def read_proof(address: Tcp | None, proof: KvProof, timeout_s: float) -> float:
    """Bytes per second of a proof, from its first byte to its last. Raises :class:`TransferFailed`."""
    if address is None or not 0 < proof.nbytes <= PROOF_NBYTES:
        raise TransferFailed(f"a proof of {proof.nbytes} bytes cannot be had from {address}")
    target = memoryview(bytearray(proof.nbytes))
    with Stream(address.pair, proof.ticket, timeout_s) as reader:
        began = time.perf_counter()
        reader.read(target)
        return proof.nbytes / max(time.perf_counter() - began, 1e-9)
