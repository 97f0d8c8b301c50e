"""The prefill machine on real sockets and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import structlog

from dsengine.collective import Collective
from dsengine.instance import RunningInstance
from dsengine.instance_actor import InstanceActor, routes, settings
from dskv.copying import SMALL_NBYTES
from dskv.handle import KvKey
from dsprefill.events import BeMet, EndSend, Meeting, Seal, Sealed, Sending, SendKv
from dsprefill.state import PrefillConfig, PrefillState
from dssched.steps import ForgetSequence, RunStep
from dstopology.resolved import Topology
from dswire.actor import Route
from dswire.errors import DsError

log = structlog.get_logger()


class PrefillActor(InstanceActor):
    """Performs what the machine asks for."""

    machine: PrefillState

    def __init__(self, machine: PrefillState, routes: list[Route], running: RunningInstance) -> None:
        super().__init__(machine, routes, running)
        #: blocks and checksums of prompts that are read, begun before the machine asks for them: what it says
        #: meanwhile takes as long
        self._sealing: dict[KvKey, tuple[tuple[int, ...], Future[int]]] = {}

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsprefill.events``."""
        match action:
            case Seal():
                self.spawn(self._seal(action), "seal")
            case SendKv():
                self.spawn(self._send_kv(action), "send")
            case EndSend(reader):
                self._collective.drop(reader)
            case BeMet():
                self.spawn(self._be_met(action), "trial")
            case ForgetSequence(key):
                self._sealing.pop(key, None)
                self._running.withdraw(key)
                super().perform(action)
            case _:
                super().perform(action)

    def computed(self, step: RunStep) -> None:
        """Begin to seal the prompts that are read."""
        for run in step.runs:
            # what goes in parts is sealed in parts
            whole = not (run.start and self.machine.config.part_tokens)
            worth = self._running.sealing or (self._verifies and self._nbytes(run.blocks) > SMALL_NBYTES)
            if run.draws and whole and worth:
                begun = self._running.seal_soon(run.key, run.blocks, summed=self._verifies)
                self._sealing[run.key] = run.blocks, begun

    async def _seal(self, action: Seal) -> Sealed:
        (blocks, begun), checksum = self._sealing.pop(action.key, ((), None)), 0
        try:
            if begun is not None and blocks == action.blocks:
                checksum = await asyncio.wrap_future(begun)
            elif self._verifies or self._running.sealing:
                seal = partial(self._running.seal, action.key, action.blocks, summed=self._verifies)
                checksum = await self._running.copy(self._nbytes(action.blocks), seal)
        except DsError as error:
            await self._running.unless_lost()
            return Sealed(self.now(), action.key, 0, error.info())
        return Sealed(self.now(), action.key, checksum)

    @property
    def _verifies(self) -> bool:
        welcome = self.machine.links.welcome
        return welcome is None or welcome.verify

    def _nbytes(self, blocks: tuple[int, ...]) -> int:
        return len(blocks) * self._running.capacity.layout.block_nbytes

    @property
    def _collective(self) -> Collective:
        collective = self._running.collective
        assert collective is not None, "the relay has owners send where the topology says so"
        return collective

    async def _send_kv(self, action: SendKv) -> Sending:
        key, number = action.handle.key, action.number
        try:
            blocks = self._running.pools.canonical(action.handle.blocks)
            meeting, sending = self._collective.send(action.reader, blocks)
        except DsError as error:
            return Sending(self.now(), key, number, "", error.info())
        self.spawn(self._sent(str(key), sending), "send")
        return Sending(self.now(), key, number, meeting)

    async def _be_met(self, action: BeMet) -> Meeting:
        try:
            meeting, trial = self._collective.meet()
        except DsError as error:
            return Meeting(self.now(), action.reader, action.by, "", error.info())
        self.spawn(self._sent("trial", trial), "trial")
        return Meeting(self.now(), action.reader, action.by, meeting)

    async def _sent(self, what: str, sending: Future[None]) -> None:
        try:
            await asyncio.wrap_future(sending)
        except DsError as error:
            # the reader sees that nothing comes, and says so
            log.info("KV was not sent", handle=what, why=error.message)


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> PrefillActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    shared = settings(topology, instance, running)
    config = PrefillConfig(**shared, shards=running.shards, near=running.near, part_tokens=topology.part_tokens)
    return PrefillActor(PrefillState(config), routes(topology, name, config.incarnation), running)
