"""The decode machine on real sockets and a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyChunk, CopyDirect, CopyEnded
from dsdecode.state import DecodeState
from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools
from dskv.receive import Receiver
from dssched.steps import ForgetSequence, StartSequence
from dstopology.resolved import Topology
from dswire.actor import Route
from dswire.errors import DsError, ErrorInfo, TransferFailed


class DecodeActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: DecodeState

    def __init__(self, machine: DecodeState, routes: list[Route], running: RunningInstance) -> None:
        super().__init__(machine, routes, running)
        #: of every sequence that comes in chunks
        self._receivers: dict[KvKey, Receiver] = {}

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsdecode.events``."""
        match action:
            case CopyDirect():
                self.spawn(self._copy_direct(action), "copy")
            case CopyChunk():
                self.spawn(self._copy_chunk(action), "copy")
            case StartSequence(key) | ForgetSequence(key):
                self._receivers.pop(key, None)
                super().perform(action)
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
        return CopyEnded(self.now(), handle.key, None, True, error)

    async def _copy_chunk(self, action: CopyChunk) -> CopyEnded:
        handle = action.handle
        receiver = self._receivers.get(handle.key)
        if receiver is None:
            receiver = self._receivers[handle.key] = self._receive(handle, action.blocks)
        welcome = self.machine.links.staging

        def run() -> None:
            if welcome is None:
                raise TransferFailed("the relay has told of no staging memory")
            staging = self._mapped.get(Path(welcome.staging), welcome.slots, welcome.slot_nbytes)
            receiver.take(action.chunk, staging.slot(action.slot))
            if action.last:
                receiver.verify()

        nbytes = action.chunk.count * handle.layout.block_nbytes
        error = await self._running.copy(nbytes, lambda: _error_of(run))
        if error is not None:
            # should it come once more, then from the beginning
            self._receivers.pop(handle.key, None)
        return CopyEnded(self.now(), handle.key, action.chunk, action.last, error)

    def _receive(self, handle: KvHandle, blocks: tuple[int, ...]) -> Receiver:
        welcome = self.machine.links.staging
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
    return DecodeActor(DecodeState(config), routes(topology, name, config.incarnation), running)
