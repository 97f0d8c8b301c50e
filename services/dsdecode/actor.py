"""The decode machine on real sockets and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyDirect, CopyEnded, CopyStream, CutStream
from dsdecode.state import DecodeState
from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.stream import Stream
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
        self._topology = topology
        #: under way
        self._streams: dict[KvKey, Stream] = {}
        #: beside the thread of copies: who waits for another host holds nobody up on this one
        self._readers = ThreadPoolExecutor(STREAMS, thread_name_prefix="stream")

    def closed(self) -> None:
        """Leave all streams, then as every instance."""
        for stream in self._streams.values():
            stream.cut()
        self._readers.shutdown()
        super().closed()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsdecode.events``."""
        match action:
            case CopyDirect():
                self.spawn(self._copy_direct(action), "copy")
            case CopyStream():
                self.spawn(self._copy_stream(action), "stream")
            case CutStream(key):
                stream = self._streams.get(key)
                if stream is not None:
                    stream.cut()
            case _:
                super().perform(action)

    async def _copy_direct(self, action: CopyDirect) -> CopyEnded:
        handle = action.handle

        def run() -> None:
            source = RankPools.map(handle.layout, handle.shards, handle.segment_blocks, self._mapped)
            receiver = self._receive(handle, action.blocks)
            receiver.copy_direct(source)
            receiver.verify()

        error = await self._running.copy(handle.nbytes, lambda: _error_of(run))
        return CopyEnded(self.now(), handle.key, error)

    async def _copy_stream(self, action: CopyStream) -> CopyEnded:
        handle, relay = action.handle, self._topology.relay_of(action.handle.node)
        assert relay.stream_connect is not None, "the relay gives tickets for what can be reached"
        stream = Stream(relay.stream_connect.pair, action.ticket, relay.transfer_timeout_s)
        self._streams[handle.key] = stream

        def run() -> None:
            receiver = self._receive(handle, action.blocks)
            with stream:
                receiver.receive(stream.read)
            receiver.verify()

        error = await asyncio.get_running_loop().run_in_executor(self._readers, _error_of, run)
        if self._streams[handle.key] is stream:
            del self._streams[handle.key]
        return CopyEnded(self.now(), handle.key, error)

    def _receive(self, handle: KvHandle, blocks: tuple[int, ...]) -> Receiver:
        welcome = self.machine.links.welcome
        return Receiver(handle, self._running.pools, blocks, summed=welcome is None or welcome.verify)


def _error_of(run: Callable[[], None]) -> ErrorInfo | None:
    try:
        run()
    except DsError as error:
        return error.info()
    return None


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> DecodeActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    config = DecodeConfig(
        **settings(topology, instance, running),
        relayed=bool(topology.relays),
        prefill_priority=instance.prefill_priority,
    )
    return DecodeActor(DecodeState(config), routes(topology, name, config.incarnation), running, topology)
