"""What the actors of prefill and decode instances share: coming up, leaving, and steps of a real engine."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from dsengine.instance import RunningInstance, logprobs
from dsengine.runner import StepItem
from dsengine.sampler import SamplerState
from dskv.handle import KvKey
from dskv.segment import SegmentCache
from dssched.instance import InstanceState
from dssched.steps import ForgetSequence, Made, RunStep, StartSequence, Stepped
from dstopology.resolved import Instance, Topology
from dstopology.wiring import relay_route, router_route
from dswire.actor import Actor, Route
from dswire.errors import DsError, ErrorInfo
from dswire.links import ROUTER
from dswire.messages import worker


class InstanceActor(Actor):
    """Performs what the machine of an instance asks for."""

    machine: InstanceState

    def __init__(self, machine: InstanceState, routes: list[Route], running: RunningInstance) -> None:
        super().__init__(machine, routes)
        self._running = running
        self._mapped = SegmentCache(warm=True)
        #: of every sequence that takes part in steps
        self._samplers: dict[KvKey, SamplerState] = {}

    def started(self) -> None:
        """Say hello; the router's welcome makes us ready."""
        loop = asyncio.get_running_loop()
        self._running.engine.watch(lambda error: loop.call_soon_threadsafe(self._ranks_lost, error))
        self.wake()

    def stopping(self) -> None:
        """Let the router try elsewhere at once."""
        self.send(ROUTER, worker.WorkerBye())

    def abandon(self) -> None:
        """The files of pools would outlive us."""
        self._running.engine.abandon()

    def closed(self) -> None:
        """Give threads and memory back."""
        self._running.close()
        self._mapped.close()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dssched.steps`` or ``dswire.links``."""
        match action:
            case RunStep():
                self.spawn(self._step(action), "step")
            case StartSequence():
                self._samplers[action.key] = self._running.engine.sampler(
                    action.sampling, action.prompt_ids, action.output_ids
                )
            case ForgetSequence(key):
                self._samplers.pop(key, None)
            case _:
                super().perform(action)

    def computed(self, step: RunStep) -> None:
        """A step is done, and the machine has not heard of it yet; called in the thread of steps."""

    def _ranks_lost(self, error: DsError) -> None:
        """The instance ends; the router tries elsewhere at once."""
        self.send(ROUTER, worker.WorkerBye())
        self.finish(error)

    async def _step(self, step: RunStep) -> Stepped:
        items = [
            StepItem(run.tokens, run.start, run.blocks, self._samplers[run.key] if run.draws else None)
            for run in step.runs
        ]
        began = self.now()
        results = await self._running.step(items, lambda: self.computed(step))
        made: list[Made] = []
        failed: list[tuple[KvKey, ErrorInfo]] = []
        for run, result in zip(step.runs, results, strict=True):
            if isinstance(result, ErrorInfo):
                failed.append((run.key, result))
            elif result is None:
                made.append(Made(run.key, None))
            else:
                made.append(Made(run.key, result.token, logprobs(result)))
        now = self.now()
        return Stepped(now, step.number, tuple(made), now - began, tuple(failed))


def settings(topology: Topology, instance: Instance, running: RunningInstance) -> dict[str, Any]:
    """What the machines of both roles must know, by the names of :class:`~dssched.instance.InstanceConfig`."""
    return {
        "name": instance.name,
        "node": instance.node,
        "incarnation": uuid.uuid4().hex[:12],
        "model": running.model,
        "capacity": running.capacity,
        "eos_ids": running.engine.model.eos_ids,
        "max_queue": instance.max_queue,
        "max_batch": instance.max_batch,
        "max_batch_tokens": instance.max_batch_tokens,
        "stages": running.stages,
        "prefix_cache": instance.prefix_cache,
    }


def routes(topology: Topology, name: str, incarnation: str) -> list[Route]:
    """The connections of an instance: to the router, and to the relay of its node where there is one."""
    found = [router_route(topology, name, incarnation)]
    return [*found, relay_route(topology, name)] if topology.relays else found
