"""A router that does what a test tells it, on a real socket: for testing clients without an engine.

Hellos and pings are answered by themselves (unless ``mute``); everything else waits in order for :meth:`expect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import msgspec

from dswire.codec import Decoder, encode
from dswire.errors import DsError
from dswire.keys import CurveKeys
from dswire.messages import PROTOCOL
from dswire.messages.client import (
    Accepted,
    Attach,
    ClientHello,
    ClientHelloWanted,
    ClientPing,
    ClientPong,
    ClientWelcome,
    Failed,
    Finished,
    FromClient,
    Ledger,
    Output,
    Usage,
)
from dswire.sockets import BoundSocket

MessageT = TypeVar("MessageT", bound=msgspec.Struct)

#: longest wait for a message that a test expects, in seconds
PATIENCE_S = 30.0


class ScriptedRouter:
    """To be made inside a running loop."""

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        *,
        incarnation: str = "one",
        lease_s: float = 60.0,
        protocol: int = PROTOCOL,
        keys: CurveKeys | None = None,
        forgetful: bool = False,
    ) -> None:
        self.incarnation = incarnation
        self.welcome = ClientWelcome(protocol, "router-0", incarnation, "toy", 128, lease_s)
        #: answers nothing, and takes no notice of what comes
        self.mute = False
        #: hellos that came meanwhile
        self.ignored_hellos = 0
        #: answers the next ping or request with ``ClientHelloWanted``, as a router does that knows nobody
        self.forgetful = forgetful
        #: identity of the client that spoke last
        self.peer = ""
        self.hellos: list[ClientHello] = []
        self.pings = 0
        self._kept: dict[str, tuple[Accepted | Output | Finished, ...]] = {}
        self._news = asyncio.Event()
        self._inbox: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self._decoder: Decoder[FromClient] = Decoder(FromClient)
        self._socket = BoundSocket(endpoint, keys=keys)
        self._socket.start(self._on_frames)
        self.address = self._socket.endpoint

    async def expect(self, kind: type[MessageT]) -> MessageT:
        """The next message, which must be of that kind; probes of quiet requests are passed over."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self._inbox.get()
            while isinstance(message, Attach) and kind is not Attach:
                message = await self._inbox.get()
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def send(self, *messages: msgspec.Struct) -> None:
        """Send to the client that spoke last."""
        for message in messages:
            self.send_bytes(encode(message))

    def send_bytes(self, *frames: bytes) -> None:
        """Send anything."""
        self._socket.send(self.peer, frames)

    def answer(self, request_id: str, *texts: str, start: int = 0) -> None:
        """The events of a whole answer, one token for each text; the first ``start`` of them are left out."""
        self.send(*events(request_id, *texts)[start:])

    def keep(self, *events: Accepted | Output | Finished) -> None:
        """Answer every ``Attach`` to this request out of these events, as the real router does."""
        self._kept[events[0].request_id] = events

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that comes in has made ``condition`` true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def close(self) -> None:
        """Go away, as a router that was killed does."""
        self._socket.close()

    async def __aenter__(self) -> ScriptedRouter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_frames(self, peer: str, frames: list[bytes]) -> None:
        message = self._decoder.decode(frames[0])
        self._news.set()
        if self.mute:
            self.ignored_hellos += isinstance(message, ClientHello)
            return
        self.peer = peer
        if self.forgetful and not isinstance(message, ClientHello):
            self.forgetful = False
            self.send(ClientHelloWanted())
        elif isinstance(message, ClientHello):
            self.hellos.append(message)
            self.send(self.welcome)
        elif isinstance(message, ClientPing):
            self.pings += 1
            self.send(ClientPong(self.incarnation))
        elif isinstance(message, Attach) and message.request_id in self._kept:
            self.send(*self._kept[message.request_id][message.have :])
        else:
            self._inbox.put_nowait(message)


def events(request_id: str, *texts: str) -> list[Accepted | Output | Finished]:
    """Accepted, one output for each text, finished."""
    outputs = [
        Output(request_id, number, 0, (number,), text, finish_reason="stop" if number == len(texts) else "")
        for number, text in enumerate(texts, 1)
    ]
    finished = Finished(request_id, len(texts) + 1, Usage(3, len(texts)), Ledger(ttft_s=0.1, total_s=0.2))
    return [Accepted(request_id, 0, 3), *outputs, finished]


def failed(request_id: str, number: int, error: DsError) -> Failed:
    """The last event of a request that did not go well."""
    return Failed(request_id, number, error.info())
