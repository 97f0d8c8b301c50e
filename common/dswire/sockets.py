"""ZeroMQ sockets as the actors use them: synchronous sends that never wait, received frames by callback.

Two kinds, one conformance suite:

``BoundSocket`` (ROUTER, bind)
    Many peers, each named by its connection's identity. Delivery: in order for each peer, at most once; a
    message to a peer that is gone or whose queue of ``HIGH_WATER`` messages is full raises
    :class:`PeerUnreachable` and is not sent. A peer that reconnects under its identity takes it over.
``ConnectedSocket`` (DEALER, connect)
    One peer. Messages are queued (``HIGH_WATER`` at most, then :class:`PeerUnreachable`) while it is away and are
    sent when it comes back; so a hello needs no retry, and everything else needs the hello's answer first.

Frames above ``max_nbytes`` are refused by libzmq before they are read: it drops that connection. What libzmq has no
limit for is the number of frames in one message: it keeps them until the last one came, so whoever may connect can
make us hold as much as it sends. That is why anything but loopback and ``ipc`` asks for a key.
Nothing polls: libzmq's file descriptor wakes the loop, at most ``BURST`` messages are taken at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from dswire.codec import MAX_FRAME_NBYTES
from dswire.errors import PortInUse, StartFailed, Unauthorized
from dswire.keys import CurveKeys

#: messages queued for one peer in one direction
HIGH_WATER = 10_000
#: messages taken in one go before other events of the loop get their turn
BURST = 64
#: a TCP connection that is silent for so many seconds is asked whether it stands, and again after as many
KEEPALIVE_S = 2
#: what is sent over TCP and neither acknowledged nor let in for so many milliseconds ends the connection
UNACKNOWLEDGED_MS = 10_000
#: a closed socket waits this long, in milliseconds, for queued messages to leave
LINGER_MS = 500

_DENIALS = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_LINKED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_UNLINKED = int(zmq.EVENT_DISCONNECTED)

Frames = Sequence[bytes | memoryview]
#: called with (peer, frames); ``peer`` is the identity on a bound socket and "" on a connected one
OnFrames = Callable[[str, list[bytes]], None]
#: called when the other side turns the connection away; libzmq goes on trying
OnDenied = Callable[[Unauthorized], None]
#: called with True when the connection is there, and with False when it is not any more
OnLink = Callable[[bool], None]


class PeerUnreachable(ConnectionError):
    """The message was not sent: the peer is gone, or its queue is full."""


class _Socket:
    """What both kinds share: receiving by callback."""

    def __init__(self, kind: int, max_nbytes: int) -> None:
        self._zmq: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._zmq.setsockopt(zmq.LINGER, LINGER_MS)
        self._zmq.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._zmq.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._zmq.setsockopt(zmq.MAXMSGSIZE, max_nbytes)
        # A host that vanished without a FIN is noticed too, by TCP: libzmq's own heartbeats end the process when
        # they are due on a connection whose peer left while messages from it were waiting for room in the queue.
        self._zmq.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._zmq.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        self._zmq.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
        self._zmq.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
        self._zmq.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_frames: OnFrames | None = None
        self._drain_queued = False

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver to ``on_frames`` in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._on_frames = on_frames
        self._loop.add_reader(self._zmq.fileno(), self._drain)
        self._queue_drain()

    def close(self) -> None:
        """Stop delivering and close; what is queued has ``LINGER_MS`` to leave. Twice is harmless."""
        if self._zmq.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._zmq.fileno())
        self._on_frames = None
        self._zmq.close()

    def _drain(self) -> None:
        self._drain_queued = False
        for _ in range(BURST):
            if self._zmq.closed or self._on_frames is None:
                return
            try:
                frames = self._zmq.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._deliver(frames)
        self._queue_drain()

    def _deliver(self, frames: list[bytes]) -> None:
        raise NotImplementedError

    def _queue_drain(self) -> None:
        # libzmq's descriptor is edge-triggered: after a send or a full burst messages may wait without a wake-up
        if self._loop is not None and not self._drain_queued:
            self._drain_queued = True
            self._loop.call_soon(self._drain)

    def _send(self, frames: Frames) -> None:
        try:
            self._zmq.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerUnreachable(str(error)) from error
        self._queue_drain()


class BoundSocket(_Socket):
    """A ROUTER socket at a fixed address."""

    def __init__(self, endpoint: str, *, keys: CurveKeys | None = None, max_nbytes: int = MAX_FRAME_NBYTES) -> None:
        """Raises :class:`PortInUse` or :class:`StartFailed` when ``endpoint`` cannot be bound."""
        super().__init__(zmq.ROUTER, max_nbytes)
        self._zmq.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._zmq.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            keys.guard_server(self._zmq)
        try:
            self._zmq.bind(endpoint)
        except zmq.ZMQError as error:
            self._zmq.close()
            if error.errno == zmq.EADDRINUSE:
                raise PortInUse(f"{endpoint}: another process listens there") from error
            raise StartFailed(f"{endpoint}: cannot be bound: {error}") from error

    @property
    def endpoint(self) -> str:
        """Where it is bound; with the real port when port 0 was asked for."""
        return str(self._zmq.getsockopt_string(zmq.LAST_ENDPOINT))

    def send(self, peer: str, frames: Frames) -> None:
        """Send to one peer, or raise :class:`PeerUnreachable` at once."""
        self._send([peer.encode("utf-8", "surrogateescape"), *frames])

    def _deliver(self, frames: list[bytes]) -> None:
        assert self._on_frames is not None
        self._on_frames(frames[0].decode("utf-8", "surrogateescape"), frames[1:])


class ConnectedSocket(_Socket):
    """A DEALER socket towards one address."""

    def __init__(
        self,
        endpoint: str,
        identity: str,
        *,
        keys: CurveKeys | None = None,
        max_nbytes: int = MAX_FRAME_NBYTES,
        on_denied: OnDenied | None = None,
        on_link: OnLink | None = None,
    ) -> None:
        """``identity``: how the other side names this connection; unique among its peers."""
        super().__init__(zmq.DEALER, max_nbytes)
        self._endpoint = endpoint
        self._zmq.setsockopt(zmq.IDENTITY, identity.encode())
        self._zmq.setsockopt(zmq.RECONNECT_IVL, 100)
        self._zmq.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        self._on_denied = on_denied
        self._on_link = on_link
        #: libzmq's news of handshakes and, where they are wanted, of ends
        self._monitor: zmq.Socket[bytes] | None = None
        denials = _DENIALS if on_denied is not None else 0
        links = _LINKED | _UNLINKED if on_link is not None else 0
        if denials | links:
            self._monitor = self._zmq.get_monitor_socket(denials | links)
        if keys is not None:
            keys.guard_client(self._zmq)
        try:
            self._zmq.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise StartFailed(
                f"{endpoint}: is no address to connect to: {error}",
                remedy="give one like tcp://HOST:PORT or ipc:///PATH/OF/SOCKET",
            ) from error

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver to ``on_frames`` in the running loop."""
        super().start(on_frames)
        if self._monitor is not None and self._loop is not None:
            self._loop.add_reader(self._monitor.fileno(), self._look)
            self._loop.call_soon(self._look)

    def send(self, peer: str, frames: Frames) -> None:
        """Send or queue; ``peer`` is ignored, there is but one."""
        self._send(frames)

    def close(self) -> None:
        """Stop delivering and close; what is queued has ``LINGER_MS`` to leave. Twice is harmless."""
        if self._monitor is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._monitor.fileno())
            self._zmq.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        super().close()

    def _deliver(self, frames: list[bytes]) -> None:
        assert self._on_frames is not None
        self._on_frames("", frames)

    def _look(self) -> None:
        while self._monitor is not None:
            try:
                event = int(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"])
            except zmq.Again:
                return
            if event & _DENIALS and self._on_denied is not None:
                self._on_denied(_denial(self._endpoint, event))
            elif event & (_LINKED | _UNLINKED) and self._on_link is not None:
                self._on_link(event == _LINKED)


def _denial(endpoint: str, event: int) -> Unauthorized:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Unauthorized(f"{endpoint}: our key was turned away")
    return Unauthorized(
        f"{endpoint}: one side encrypts and the other does not",
        remedy="give keys where the topology is encrypted, and none where it is not",
    )
