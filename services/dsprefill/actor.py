"""The prefill machine on real sockets and a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dskv.send import stage
from dsprefill.events import Seal, Sealed, StageChunk, Staged
from dsprefill.state import PrefillConfig, PrefillState
from dstopology.resolved import Topology
from dswire.errors import TransferFailed


class PrefillActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: PrefillState

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsprefill.events``."""
        match action:
            case Seal():
                self.spawn(self._seal(action), "seal")
            case StageChunk():
                self.spawn(self._stage(action), "stage")
            case _:
                super().perform(action)

    async def _seal(self, action: Seal) -> Sealed:
        welcome, checksum = self.machine.links.staging, 0
        if welcome is None or welcome.verify:
            nbytes = len(action.blocks) * self._running.capacity.layout.block_nbytes
            checksum = await self._running.copy(nbytes, lambda: self._running.pools.checksum(action.blocks))
        return Sealed(self.now(), action.key, checksum)

    async def _stage(self, action: StageChunk) -> Staged | None:
        welcome = self.machine.links.staging
        if welcome is None:
            return None

        def run() -> bool:
            try:
                path = Path(welcome.staging)
                staging = self._mapped.get(path, welcome.slots, welcome.slot_nbytes, writable=True)
                stage(self._running.pools, action.handle, action.chunk, staging.slot(action.slot))
            except TransferFailed:
                # the relay was restarted; it will ask again, or its transfer runs into its deadline
                return False
            return True

        nbytes = action.chunk.count * action.handle.layout.block_nbytes
        done = await self._running.copy(nbytes, run)
        return Staged(self.now(), action.handle.key, action.chunk) if done else None


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> PrefillActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    config = PrefillConfig(**settings(topology, instance, running), shards=running.shards)
    return PrefillActor(PrefillState(config), routes(topology, name, config.incarnation), running)
