"""The client's shell: runs the machine on one ZeroMQ socket, the loop's clock and the callers' futures.

Everything happens in the loop that :meth:`Connection.open` was called in, one event at a time.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import TypeVar

from dsclient.events import Action, Answer, Closed, ConnectAsked, Deliver, Denied, End, Event, Garbled, StatusAsked
from dsclient.state import ROUTER, ClientState
from dsclient.stream import Stream
from dswire.codec import Decoder, encode
from dswire.errors import DsError, InvalidRequest, ProtocolError
from dswire.keys import CurveKeys
from dswire.machine import Received, Send, Tick
from dswire.messages.client import ClientWelcome, StatusReport, ToClient
from dswire.sockets import ConnectedSocket, PeerUnreachable

ResultT = TypeVar("ResultT", ClientWelcome, StatusReport)

_decoder: Decoder[ToClient] = Decoder(ToClient)


class Connection:
    """One client's connection to its router."""

    def __init__(
        self, address: str, identity: str, *, keys: CurveKeys | None, agent: str, timeout_s: float
    ) -> None:
        self.state = ClientState(address, agent=agent, timeout_s=timeout_s)
        self._address = address
        self._identity = identity
        self._keys = keys
        self._socket: ConnectedSocket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for: float | None = None
        #: streams whose request has not ended
        self._streams: dict[str, Stream] = {}
        self._asks: dict[str, asyncio.Future[ClientWelcome | StatusReport]] = {}
        self._serial = count()

    @staticmethod
    def now() -> float:
        """The clock of every event, in seconds."""
        return time.monotonic()

    def open(self) -> None:
        """Open the socket, unless it is open. Raises :class:`StartFailed` for an address that is none."""
        if self._closed:
            raise InvalidRequest("the client is closed", remedy="make a new client")
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            raise InvalidRequest(
                "the client belongs to another event loop",
                remedy="make one AsyncClient for each loop, or use Client",
            )
        if self._socket is None:
            self._loop = loop
            self._socket = ConnectedSocket(
                self._address, self._identity, keys=self._keys, on_denied=self._on_denied
            )
            self._socket.start(self._on_frames)

    def add(self, stream: Stream) -> None:
        """Deliver the events of a request to ``stream``; to be called before the request is opened."""
        self._streams[stream.request_id] = stream

    def feed(self, event: Event) -> None:
        """Take an event to the machine and perform what it answers."""
        for action in self.state.handle(event):
            self._perform(event.now, action)
        self._rearm()

    async def connected(self) -> ClientWelcome:
        """Wait for the router's welcome. Raises :class:`RouterLost` and whatever it refuses us with."""
        ask, future = self._ask()
        self.feed(ConnectAsked(self.now(), ask))
        return await self._answered(ask, future, ClientWelcome)

    async def status(self) -> StatusReport:
        """Ask for the router's view."""
        ask, future = self._ask()
        self.feed(StatusAsked(self.now(), ask))
        return await self._answered(ask, future, StatusReport)

    def close(self) -> None:
        """Say bye and close; open requests end as cancelled. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._socket is None:
            return
        self.feed(Closed(self.now()))
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()

    def _ask(self) -> tuple[str, asyncio.Future[ClientWelcome | StatusReport]]:
        ask = str(next(self._serial))
        future = self._asks[ask] = asyncio.get_running_loop().create_future()
        return ask, future

    async def _answered(
        self, ask: str, future: asyncio.Future[ClientWelcome | StatusReport], kind: type[ResultT]
    ) -> ResultT:
        try:
            result = await future
        finally:
            self._asks.pop(ask, None)
        assert isinstance(result, kind)
        return result

    def _perform(self, now: float, action: Action) -> None:
        match action:
            case Send(message=message):
                self._send([encode(message)])
            case Deliver(request_id=request_id, event=event):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.feed(now, event)
                    if stream.ended:
                        del self._streams[request_id]
            case End(request_id=request_id, error=error):
                if (stream := self._streams.pop(request_id, None)) is not None:
                    stream.fail(error)
            case Answer(ask=ask, result=result):
                self._resolve(ask, result)

    def _send(self, frames: list[bytes]) -> None:
        assert self._socket is not None
        try:
            self._socket.send(ROUTER, frames)
        except PeerUnreachable:
            # the queue towards a router that is away is full: silence and deadlines tell the callers
            return

    def _resolve(self, ask: str, result: ClientWelcome | StatusReport | DsError) -> None:
        future = self._asks.get(ask)
        if future is None or future.done():
            return
        if isinstance(result, DsError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _on_frames(self, _: str, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolError(f"{self._address}: the router sent a message of {len(frames)} frames")
            message = _decoder.decode(frames[0])
        except ProtocolError as error:
            self.feed(Garbled(self.now(), error))
        else:
            self.feed(Received(self.now(), ROUTER, message))

    def _on_denied(self, error: DsError) -> None:
        self.feed(Denied(self.now(), error))

    def _rearm(self) -> None:
        deadline = None if self._closed else self.state.next_deadline()
        if deadline == self._armed_for:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for, self._timer = deadline, None
        if deadline is not None and self._loop is not None:
            self._timer = self._loop.call_later(max(0.0, deadline - self.now()), self._tick)

    def _tick(self) -> None:
        self._armed_for, self._timer = None, None
        self.feed(Tick(self.now()))
