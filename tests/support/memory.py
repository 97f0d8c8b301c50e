"""The two sockets of ``dswire.sockets`` without a kernel: for tests that run many actors in one loop.

Same guarantees, same suite (``tests/protocol/test_sockets.py``). An address is a name within one :class:`Memory`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from dswire.codec import MAX_FRAME_NBYTES
from dswire.errors import PortInUse
from dswire.sockets import HIGH_WATER, Frames, OnFrames, PeerUnreachable


class Memory:
    """One world of addresses."""

    def __init__(self) -> None:
        self._bound: dict[str, MemoryBound] = {}
        self._calling: dict[str, list[MemoryConnected]] = {}

    def bind(self, address: str, *, max_nbytes: int = MAX_FRAME_NBYTES) -> MemoryBound:
        """A bound socket. Raises :class:`PortInUse`."""
        if address in self._bound:
            raise PortInUse(f"{address}: another socket listens there")
        bound = self._bound[address] = MemoryBound(self, address, max_nbytes)
        for caller in self._calling.get(address, ()):
            caller.attach(bound)
        return bound

    def connect(self, address: str, identity: str) -> MemoryConnected:
        """A connected socket; nobody needs to be bound yet."""
        caller = MemoryConnected(self, address, identity)
        self._calling.setdefault(address, []).append(caller)
        if address in self._bound:
            caller.attach(self._bound[address])
        return caller

    def unbind(self, address: str) -> None:
        """The bound socket was closed."""
        del self._bound[address]
        for caller in self._calling.get(address, ()):
            caller.detach()

    def hang_up(self, caller: MemoryConnected) -> None:
        """The connected socket was closed."""
        self._calling[caller.address].remove(caller)


class _Inbox:
    """What has arrived and waits for the loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, list[bytes]]] = deque()
        self._on_frames: OnFrames | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def full(self) -> bool:
        return len(self._waiting) >= HIGH_WATER

    def start(self, on_frames: OnFrames) -> None:
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._drain)

    def put(self, peer: str, frames: list[bytes]) -> None:
        self._waiting.append((peer, frames))
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def stop(self) -> None:
        self._on_frames = None
        self._waiting.clear()

    def _drain(self) -> None:
        while self._waiting and self._on_frames is not None:
            self._on_frames(*self._waiting.popleft())


class MemoryBound:
    """Like ``BoundSocket``."""

    def __init__(self, memory: Memory, endpoint: str, max_nbytes: int) -> None:
        self.endpoint = endpoint
        self.max_nbytes = max_nbytes
        self.inbox = _Inbox()
        self.peers: dict[str, MemoryConnected] = {}
        self._memory = memory
        self._closed = False

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver."""
        self.inbox.start(on_frames)

    def send(self, peer: str, frames: Frames) -> None:
        """Send to one peer, or raise :class:`PeerUnreachable` at once."""
        caller = self.peers.get(peer)
        if caller is None or caller.inbox.full or self._closed:
            raise PeerUnreachable(f"{peer}: is not connected, or its queue is full")
        caller.inbox.put("", _copied(frames))

    def close(self) -> None:
        """Close; every peer's connection breaks."""
        if not self._closed:
            self._closed = True
            self.inbox.stop()
            self._memory.unbind(self.endpoint)


class MemoryConnected:
    """Like ``ConnectedSocket``."""

    def __init__(self, memory: Memory, address: str, identity: str) -> None:
        self.address = address
        self.identity = identity
        self.inbox = _Inbox()
        self._memory = memory
        self._bound: MemoryBound | None = None
        self._queued: deque[list[bytes]] = deque()
        self._closed = False

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver."""
        self.inbox.start(on_frames)

    def attach(self, bound: MemoryBound) -> None:
        """The other side is there: it gets what was queued. An older connection of this identity gives way."""
        older = bound.peers.get(self.identity)
        if older is not None and older is not self:
            older.detach()
        bound.peers[self.identity] = self
        self._bound = bound
        while self._queued:
            self._pass(self._queued.popleft())

    def detach(self) -> None:
        """The connection broke."""
        self._bound = None

    def send(self, peer: str, frames: Frames) -> None:
        """Send, or queue while nobody is there."""
        if self._closed or len(self._queued) >= HIGH_WATER or (self._bound is not None and self._bound.inbox.full):
            raise PeerUnreachable(f"{self.address}: the queue is full")
        self._queued.append(_copied(frames))
        if self._bound is not None:
            self._pass(self._queued.popleft())

    def close(self) -> None:
        """Close; the other side can send here no more."""
        if self._closed:
            return
        self._closed = True
        self.inbox.stop()
        self._memory.hang_up(self)
        if self._bound is not None and self._bound.peers.get(self.identity) is self:
            del self._bound.peers[self.identity]

    def _pass(self, frames: list[bytes]) -> None:
        bound = self._bound
        if bound is None:
            return
        if any(len(frame) > bound.max_nbytes for frame in frames):
            # libzmq drops the connection, and the client makes a new one
            return
        bound.inbox.put(self.identity, frames)


def _copied(frames: Sequence[bytes | memoryview]) -> list[bytes]:
    return [bytes(frame) for frame in frames]
