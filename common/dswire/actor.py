"""The actor shell: runs a machine on real sockets, a real clock and real work.

One loop turn takes one event to the machine and performs its actions before the next event is looked at, so the
machine never sees a half-performed step. Blocking work (a model step, a copy) runs as a task whose result comes
back as an event. Any unexpected exception ends :meth:`Actor.run`, and with it the process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from dswire.codec import Decoder, encode
from dswire.errors import DsError, ProtocolError, from_info
from dswire.links import End, Ready
from dswire.machine import Machine, PeerLost, Received, Send, Tick
from dswire.sockets import OnFrames, PeerUnreachable

log = structlog.get_logger()

#: a worker that nobody has welcomed for this long, in seconds, says so in its log
WELCOME_S = 10.0


class Socket(Protocol):
    """What the shell needs of a socket; ZeroMQ's and the tests' in-memory one fit."""

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver."""

    def send(self, peer: str, frames: Sequence[bytes | memoryview]) -> None:
        """Send at once or raise :class:`PeerUnreachable`."""

    def close(self) -> None:
        """Close."""


class Route:
    """A socket, what may come in through it, and how its peers are named inside the machine."""

    def __init__(self, socket: Socket, union: Any, *, prefix: str = "", peer: str = "") -> None:
        """A bound socket's peers are ``prefix + identity``; a connected one's only peer is ``peer``."""
        self.socket = socket
        self.decoder: Decoder[msgspec.Struct] = Decoder(union)
        self.prefix = prefix
        self.peer = peer
        #: what to do when the other side turns our key away; set by the actor
        self.on_denied: Callable[[DsError], None] = _ignore
        #: what to do when the connection comes and goes, where the socket tells; set by the actor
        self.on_link: Callable[[bool], None] = _ignore

    def denied(self, error: DsError) -> None:
        """For a connected socket to call: the other side turns us away."""
        self.on_denied(error)

    def linked(self, there: bool) -> None:
        """For a connected socket to call: the connection is there, or gone."""
        self.on_link(there)

    def name(self, identity: str) -> str:
        """The machine's name for a connection."""
        return self.peer or self.prefix + identity

    def owns(self, peer: str) -> bool:
        """Whether messages for ``peer`` leave here."""
        return peer == self.peer if self.peer else peer.startswith(self.prefix)

    def identity(self, peer: str) -> str:
        """The connection's identity for the machine's name."""
        return peer.removeprefix(self.prefix)


class Actor:
    """Runs one machine. A service subclasses it to perform its own actions."""

    def __init__(self, machine: Machine, routes: Sequence[Route]) -> None:
        self.machine = machine
        #: first match wins, so a route with an empty prefix comes last
        self.routes = list(routes)
        self._loop: asyncio.AbstractEventLoop
        self._tasks: asyncio.TaskGroup
        self._ended: asyncio.Future[None]
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def now() -> float:
        """The clock of every event, in seconds."""
        return time.monotonic()

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until ``stop`` is set; raises whatever went wrong. ``on_ready`` is called once."""
        self._loop = asyncio.get_running_loop()
        self._on_ready: Callable[[], None] | None = on_ready
        self._ended = self._loop.create_future()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                stopped = self._tasks.create_task(_wait(stop), name="stop")
                for route in self.routes:
                    route.on_denied = self.finish
                    route.socket.start(self._receiver(route))
                waiting = self._loop.call_later(WELCOME_S, self._unless_ready)
                self._guard(self.started)
                await asyncio.wait([stopped, self._ended], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                stopped.cancel()
                if self._ended.done():
                    self._ended.result()
                self.stopping()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for route in self.routes:
                route.socket.close()
            self.closed()

    def started(self) -> None:
        """Called once when the sockets deliver: wakes the machine. A worker is ready only when welcomed."""
        self.wake()
        self.ready()

    def wake(self) -> None:
        """Give the machine its first event."""
        self.feed(Tick(self.now()))

    def ready(self) -> None:
        """Tell, once, that this process serves."""
        if self._on_ready is not None:
            on_ready, self._on_ready = self._on_ready, None
            on_ready()

    def stopping(self) -> None:
        """Called once before an orderly end, sockets still open."""

    def closed(self) -> None:
        """Called once when all is over, sockets closed: give everything else back."""

    def abandon(self) -> None:
        """Called when an orderly end took too long: remove what would outlive the process. Never blocks."""

    def finish(self, error: Exception | None = None) -> None:
        """End the actor from within, well or with ``error``."""
        if not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)

    def feed(self, event: Any) -> None:
        """Take an event to the machine and perform what it answers."""
        lost: list[str] = []
        for action in self.machine.handle(event):
            if isinstance(action, Send):
                self._send(action, lost)
            else:
                self.perform(action)
        for peer in lost:
            self.feed(PeerLost(self.now(), peer))
        self._rearm()

    def soon(self, event: Any) -> None:
        """Feed an event once the actions under way are performed."""
        self._loop.call_soon(self._guard, lambda: self.feed(event))

    def perform(self, action: Any) -> None:
        """Perform a service's own action, or what the links of all ask for.

        Raises ``TypeError`` for one that nobody knows.
        """
        match action:
            case Ready():
                self.ready()
            case End(error):
                self.finish(from_info(error))
            case _:
                raise TypeError(f"no way to perform {action!r}")

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message."""
        lost: list[str] = []
        self._send(Send(peer, message), lost)
        for gone in lost:
            self.feed(PeerLost(self.now(), gone))

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run ``work`` as a child task; the event that it returns (None for none) is fed to the machine."""
        self._tasks.create_task(self._work(work), name=name)

    def garbage(self, peer: str, error: ProtocolError) -> None:
        """A peer sent what cannot be read; nothing of it reached the machine."""
        # a stranger chooses its own identity: it may hold what no terminal or file can show
        log.warning("unreadable message", peer=ascii(peer), error=ascii(error.message))

    async def _work(self, work: Coroutine[Any, Any, Any]) -> None:
        event = await work
        if event is not None:
            self.feed(event)

    def _send(self, action: Send, lost: list[str]) -> None:
        route = next(route for route in self.routes if route.owns(action.peer))
        try:
            route.socket.send(route.identity(action.peer), [encode(action.message)])
        except PeerUnreachable:
            if action.peer not in lost:
                lost.append(action.peer)

    def _receiver(self, route: Route) -> OnFrames:
        def on_frames(identity: str, frames: list[bytes]) -> None:
            self._guard(lambda: self._take(route, identity, frames))

        return on_frames

    def _take(self, route: Route, identity: str, frames: list[bytes]) -> None:
        peer = route.name(identity)
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message is one frame, this one has {len(frames)}")
            message = route.decoder.decode(frames[0])
        except ProtocolError as error:
            self.garbage(peer, error)
            return
        self.feed(Received(self.now(), peer, message))

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.machine.next_deadline()
        if deadline is not None:
            delay = max(0.0, deadline - self.now())
            self._timer = self._loop.call_later(delay, self._guard, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(Tick(self.now()))

    def still_waiting(self) -> None:
        """Called once when this process is not ready after ``WELCOME_S``: tells what it waits for."""
        remedy = "see that the router is up and reads the same topology, and that both have the same keys"
        log.warning("not registered: the router does not answer", waited_s=WELCOME_S, remedy=remedy)

    def _unless_ready(self) -> None:
        if self._on_ready is not None:
            self.still_waiting()

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - process boundary: run() raises it, a loop callback cannot
            self.finish(error)


def _ignore(_: object) -> None:
    pass


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
