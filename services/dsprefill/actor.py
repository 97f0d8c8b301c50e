"""The prefill machine on real sockets and a real engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsengine.instance import RunningInstance, logprobs, run_each
from dsengine.runner import StepItem
from dsengine.sampler import Sampled
from dskv.segment import SegmentCache
from dskv.send import stage
from dsprefill.events import (
    End,
    FirstToken,
    PrefillRun,
    PrefillStepped,
    Ready,
    RunPrefill,
    Seal,
    Sealed,
    StageChunk,
    Staged,
)
from dsprefill.state import PrefillConfig, PrefillState
from dstopology.resolved import Topology
from dstopology.wiring import relay_route, router_route
from dswire.actor import Actor, Route
from dswire.errors import ErrorInfo, TransferFailed, from_info
from dswire.links import ROUTER
from dswire.messages import worker


class PrefillActor(Actor):
    """Performs what the machine asks for."""

    machine: PrefillState

    def __init__(self, machine: PrefillState, routes: list[Route], running: RunningInstance) -> None:
        super().__init__(machine, routes)
        self._running = running
        self._mapped = SegmentCache()

    def started(self) -> None:
        """Say hello; the router's welcome makes us ready."""
        self.wake()

    def stopping(self) -> None:
        """Let the router try elsewhere at once."""
        self.send(ROUTER, worker.WorkerBye())

    def abandon(self) -> None:
        """The pool's file would outlive us."""
        self._running.segment.unlink()

    def closed(self) -> None:
        """Give threads and memory back."""
        self._running.close()
        self._mapped.close()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsprefill.events``."""
        match action:
            case RunPrefill(runs):
                self.spawn(self._step(runs), "prefill step")
            case Seal():
                self.spawn(self._seal(action), "seal")
            case StageChunk():
                self.spawn(self._stage(action), "stage")
            case Ready():
                self.ready()
            case End(error):
                self.finish(from_info(error))
            case _:
                super().perform(action)

    async def _step(self, runs: tuple[PrefillRun, ...]) -> PrefillStepped:
        engine = self._running.engine

        def run() -> list[Any]:
            items = [
                StepItem(
                    [*one.prompt_ids, *one.output_ids],
                    0,
                    one.blocks,
                    engine.sampler(one.sampling, one.prompt_ids, one.output_ids),
                )
                for one in runs
            ]
            return run_each(engine.step, items)

        began = self.now()
        results = await self._running.step(run)
        pairs = [(one.key, result) for one, result in zip(runs, results, strict=True)]
        tokens = tuple(FirstToken(key, r.token, logprobs(r)) for key, r in pairs if isinstance(r, Sampled))
        failed = tuple((key, r) for key, r in pairs if isinstance(r, ErrorInfo))
        now = self.now()
        return PrefillStepped(now, tokens, now - began, failed)

    async def _seal(self, action: Seal) -> Sealed:
        checksum = await self._running.copy(lambda: self._running.pools.checksum(action.blocks))
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

        done = await self._running.copy(run)
        return Staged(self.now(), action.handle.key, action.chunk) if done else None


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> PrefillActor:
    """Load and wire the instance ``name``."""
    instance = topology.instance(name)
    running = await RunningInstance.load(topology, instance, phase)
    config = PrefillConfig(
        name=name,
        node=instance.node,
        incarnation=uuid.uuid4().hex[:12],
        model=running.model,
        capacity=running.capacity,
        eos_ids=running.engine.model.eos_ids,
        shards=running.shards,
        max_queue=instance.max_queue,
        max_batch=instance.max_batch,
        target_tokens=instance.max_batch_tokens,
    )
    routes = [router_route(topology, name, config.incarnation), relay_route(topology, name)]
    return PrefillActor(PrefillState(config), routes, running)
