"""The prefill machine on real sockets and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from dsengine.collective import Collective
from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dsprefill.events import EndSend, Seal, Sealed, Sending, SendKv
from dsprefill.state import PrefillConfig, PrefillState
from dstopology.resolved import Topology
from dswire.errors import DsError

log = structlog.get_logger()


class PrefillActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: PrefillState

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsprefill.events``."""
        match action:
            case Seal():
                self.spawn(self._seal(action), "seal")
            case SendKv():
                self.spawn(self._send_kv(action), "send")
            case EndSend(reader):
                self._collective.drop(reader)
            case _:
                super().perform(action)

    async def _seal(self, action: Seal) -> Sealed:
        welcome, checksum = self.machine.links.welcome, 0
        if welcome is None or welcome.verify:
            nbytes = len(action.blocks) * self._running.capacity.layout.block_nbytes
            checksum = await self._running.copy(nbytes, lambda: self._running.pools.checksum(action.blocks))
        return Sealed(self.now(), action.key, checksum)

    @property
    def _collective(self) -> Collective:
        collective = self._running.collective
        assert collective is not None, "the relay has owners send where the topology says so"
        return collective

    async def _send_kv(self, action: SendKv) -> Sending:
        key, number = action.handle.key, action.number
        try:
            meeting = self._collective.invite(action.reader)
        except DsError as error:
            return Sending(self.now(), key, number, "", error.info())
        self.spawn(self._send_to(action), "send")
        return Sending(self.now(), key, number, meeting)

    async def _send_to(self, action: SendKv) -> None:
        blocks = self._running.pools.canonical(action.handle.blocks)
        try:
            await asyncio.wrap_future(self._collective.send(action.reader, blocks))
        except DsError as error:
            # the reader sees that nothing comes, and says so
            log.info("KV was not sent", handle=str(action.handle.key), why=error.message)


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> PrefillActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    config = PrefillConfig(**settings(topology, instance, running), shards=running.shards)
    return PrefillActor(PrefillState(config), routes(topology, name, config.incarnation), running)
