"""A TCP path between two hosts with delay, jitter and loss, which a test can cut and heal.

What a lost packet does to a TCP stream is that everything behind it waits for the retransmission; so does it here.
A wire that was cut holds what was sent, as the buffers of two kernels do, and tells neither side.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable
from types import TracebackType

from support.namespaces import socket_in

#: one way
DELAY_S = 0.001
JITTER_S = 0.001
#: share of pieces that come late, and by how much
LOSS = 0.02
RETRANSMISSION_S = 0.05
_PIECE_NBYTES = 1 << 16


class LongWire:
    """Carries TCP connections from one host to the other. Use as a context manager; it runs in its own thread."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire")
        self._open = asyncio.Event()
        self._open.set()
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()
        #: cut when this many more bytes have gone to the caller of ``_watched``
        self._cut_after: int | None = None
        self._watched: int | None = None
        self._was_cut = threading.Event()

    def join(self, far: str, address: str, port: int, host: str) -> None:
        """Listen at ``address:port`` in the namespace ``far``; the same is called inside ``host``."""
        listening = socket_in(far, lambda: socket.create_server((address, port)))

        async def listen() -> None:
            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._carry(reader, writer, port, lambda: self._call(host, address, port))

            self._servers.append(await asyncio.start_server(accept, sock=listening))

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(30)

    def cut_after(self, port: int, nbytes: int) -> threading.Event:
        """Cut as soon as ``nbytes`` have come from the listener at ``port``; the event tells of it."""
        self._was_cut.clear()

        def arm() -> None:
            self._watched, self._cut_after = port, nbytes

        self._loop.call_soon_threadsafe(arm)
        return self._was_cut

    def heal(self) -> None:
        """Everything goes on."""
        self._loop.call_soon_threadsafe(self._open.set)

    def reset(self) -> None:
        """Break every connection, as a firewall that forgot them does; new ones can be made."""

        def abort() -> None:
            for writer in self._writers:
                writer.transport.abort()
            self._open.set()

        self._loop.call_soon_threadsafe(abort)

    def __enter__(self) -> LongWire:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in self._writers:
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    def _call(host: str, address: str, port: int) -> socket.socket:
        return socket_in(host, lambda: socket.create_connection((address, port), timeout=30))

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        port: int,
        call: Callable[[], socket.socket],
    ) -> None:
        await self._open.wait()
        try:
            called = await asyncio.to_thread(call)
        except OSError:
            # nobody listens yet: the caller is told so, and tries again
            writer.transport.abort()
            return
        called.setblocking(False)
        there, back = await asyncio.open_connection(sock=called)
        ends = {writer, back}
        self._writers |= ends
        try:
            await asyncio.gather(self._pump(reader, back, None), self._pump(there, writer, port))
        finally:
            self._writers -= ends

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, port: int | None) -> None:
        try:
            while piece := await source.read(_PIECE_NBYTES):
                await asyncio.sleep(DELAY_S + self._random.uniform(0.0, JITTER_S))
                if self._random.random() < LOSS:
                    await asyncio.sleep(RETRANSMISSION_S)
                self._count(port, len(piece))
                await self._open.wait()
                sink.write(piece)
                await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.transport.abort()

    def _count(self, port: int | None, nbytes: int) -> None:
        if self._cut_after is None or port != self._watched:
            return
        self._cut_after -= nbytes
        if self._cut_after <= 0:
            self._cut_after = None
            self._open.clear()
            self._was_cut.set()
