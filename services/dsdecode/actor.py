"""The decode machine on real sockets and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyDirect, CopyEnded, CopyStream, CutStream, OwnerTried, TryOwner
from dsdecode.state import DecodeState
from dsdecode.transports import Transports
from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dskv.copying import copier
from dskv.handle import KvHandle, KvKey
from dskv.transport import Transport
from dstopology.resolved import Topology
from dswire.actor import Route
from dswire.errors import DsError, ErrorInfo

#: streams read at once
STREAMS = 4


class DecodeActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: DecodeState

    def __init__(
        self, machine: DecodeState, routes: list[Route], running: RunningInstance, topology: Topology
    ) -> None:
        super().__init__(machine, routes, running)
        self._transports = Transports(topology, self._mapped, running.collective)
        #: KV that comes from other processes by their help
        self._coming: dict[KvKey, Transport] = {}
        #: beside the thread of copies: who waits for another host holds nobody up on this one
        self._readers = ThreadPoolExecutor(STREAMS, thread_name_prefix="stream")

    def closed(self) -> None:
        """Leave all that comes, then as every instance."""
        for transport in self._coming.values():
            transport.cut()
        self._readers.shutdown()
        super().closed()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsdecode.events``."""
        match action:
            case CopyDirect():
                # begun here and not within the task, which has to wait for its turn
                self.spawn(self._copied(action.handle.key, self._copy_direct(action)), "copy")
            case CopyStream():
                self.spawn(self._copy_stream(action), "stream")
            case CutStream(key):
                if key in self._coming:
                    self._coming[key].cut()
            case TryOwner():
                self.spawn(self._try(action), "trial")
            case _:
                super().perform(action)

    async def _try(self, action: TryOwner) -> OwnerTried:
        loop = asyncio.get_running_loop()
        read = partial(self._running.read_rate, action.owner, action.pool, action.meeting)
        try:
            rate = await loop.run_in_executor(self._readers, read)
        except DsError as error:
            return OwnerTried(self.now(), action.owner, 0.0, error.info())
        return OwnerTried(self.now(), action.owner, rate)

    def _copy_direct(self, action: CopyDirect) -> asyncio.Future[ErrorInfo | None]:
        handle = action.handle
        transport = self._transports.of(handle, None)
        return self._running.copy(handle.nbytes, lambda: self._bring(transport, handle, action.blocks))

    async def _copied(self, key: KvKey, copying: asyncio.Future[ErrorInfo | None]) -> CopyEnded:
        error = await copying
        if error is not None:
            await self._running.unless_lost()
        return CopyEnded(self.now(), key, error)

    async def _copy_stream(self, action: CopyStream) -> CopyEnded:
        handle = action.handle
        transport = self._coming[handle.key] = self._transports.of(handle, action.ticket)
        loop = asyncio.get_running_loop()
        coming = loop.run_in_executor(self._readers, self._bring, transport, handle, action.blocks)
        ended = await self._copied(handle.key, coming)
        if self._coming[handle.key] is transport:
            del self._coming[handle.key]
        return ended

    def _bring(self, transport: Transport, handle: KvHandle, blocks: tuple[int, ...]) -> ErrorInfo | None:
        """All the KV, verified, in a thread that may wait for it; what went wrong."""
        welcome = self.machine.links.welcome
        try:
            self._running.bring(transport, handle, blocks, summed=welcome is None or welcome.verify)
        except DsError as error:
            return error.info()
        return None


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> DecodeActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    if topology.relays:
        # it may have to be compiled, which no request is to wait for
        await asyncio.to_thread(copier)
    config = DecodeConfig(
        **settings(topology, instance, running),
        relayed=bool(topology.relays),
        prefill_priority=instance.prefill_priority,
    )
    return DecodeActor(DecodeState(config), routes(topology, name, config.incarnation), running, topology)
