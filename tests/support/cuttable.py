"""A TCP path that a test can cut: neither end is told by the other, as when a network between them fails."""

from __future__ import annotations

import asyncio
from types import TracebackType


class CuttablePath:
    """Forwards connections to a port of the loopback. Use as an async context manager."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        #: forward nothing that the router says: it is taken, and lost
        self.swallow = False
        #: connections made so far
        self.connections = 0

    @property
    def address(self) -> str:
        """Where clients connect."""
        assert self._server is not None
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection; new ones can be made at once."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def __aenter__(self) -> CuttablePath:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self.connections += 1
        self._writers += [writer, back]
        for source, sink, from_router in ((reader, back, False), (there, writer, True)):
            pump = asyncio.create_task(self._pump(source, sink, from_router))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, from_router: bool) -> None:
        try:
            while data := await source.read(1 << 16):
                if not (from_router and self.swallow):
                    sink.write(data)
                    await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.transport.abort()
