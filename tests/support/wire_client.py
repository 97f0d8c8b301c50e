"""A client that speaks the protocol and nothing more: it can be silent, rude, or gone without a word."""

from __future__ import annotations

import asyncio
import uuid
from typing import TypeVar

import msgspec

from dswire.codec import Decoder, encode
from dswire.messages import PROTOCOL, client
from dswire.sockets import ConnectedSocket

MessageT = TypeVar("MessageT", bound=msgspec.Struct)


class WireClient:
    """One connection; but for the pings that keep its lease, nothing is sent that a test did not ask for."""

    def __init__(self, address: str) -> None:
        self._socket = ConnectedSocket(address, f"c-{uuid.uuid4().hex}")
        self._decoder: Decoder[msgspec.Struct] = Decoder(client.ToClient)
        self._inbox: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self._pings: asyncio.Task[None] | None = None
        self._socket.start(lambda _, frames: self._inbox.put_nowait(self._decoder.decode(frames[0])))

    async def hello(self) -> client.ClientWelcome:
        """Say hello, wait for the welcome, and keep the lease from then on."""
        self.send(client.ClientHello(PROTOCOL, "test"))
        welcome = await self.expect(client.ClientWelcome)
        self._pings = asyncio.create_task(self._ping(welcome.lease_s / 3))
        return welcome

    def send(self, message: msgspec.Struct) -> None:
        """Send a message."""
        self._socket.send("", [encode(message)])

    def send_bytes(self, *frames: bytes) -> None:
        """Send whatever."""
        self._socket.send("", list(frames))

    async def expect(self, kind: type[MessageT], limit_s: float = 60.0) -> MessageT:
        """The next message of that kind; others before it are skipped."""
        async with asyncio.timeout(limit_s):
            while True:
                message = await self._inbox.get()
                if isinstance(message, kind):
                    return message

    def drop(self) -> None:
        """Be gone, without a goodbye."""
        if self._pings is not None:
            self._pings.cancel()
        self._socket.close()

    async def _ping(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self.send(client.ClientPing())
