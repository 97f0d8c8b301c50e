"""The prefill machine on real sockets and a real engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dsprefill.events import Seal, Sealed
from dsprefill.state import PrefillConfig, PrefillState
from dstopology.resolved import Topology


class PrefillActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: PrefillState

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsprefill.events``."""
        match action:
            case Seal():
                self.spawn(self._seal(action), "seal")
            case _:
                super().perform(action)

    async def _seal(self, action: Seal) -> Sealed:
        welcome, checksum = self.machine.links.welcome, 0
        if welcome is None or welcome.verify:
            nbytes = len(action.blocks) * self._running.capacity.layout.block_nbytes
            checksum = await self._running.copy(nbytes, lambda: self._running.pools.checksum(action.blocks))
        return Sealed(self.now(), action.key, checksum)


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> PrefillActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    config = PrefillConfig(**settings(topology, instance, running), shards=running.shards)
    return PrefillActor(PrefillState(config), routes(topology, name, config.incarnation), running)
