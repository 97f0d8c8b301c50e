"""The decode machine on real sockets and a real engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdecode.events import (
    CopyChunk,
    CopyDirect,
    CopyEnded,
    DecodeRun,
    DecodeStepped,
    End,
    ForgetSequence,
    NextToken,
    Ready,
    RunDecode,
    StartSequence,
)
from dsdecode.state import DecodeConfig, DecodeState
from dsengine.instance import RunningInstance, logprobs, run_each
from dsengine.runner import StepItem
from dsengine.sampler import Sampled, SamplerState
from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import SegmentCache
from dstopology.resolved import Topology
from dstopology.wiring import relay_route, router_route
from dswire.actor import Actor, Route
from dswire.errors import DsError, ErrorInfo, TransferFailed, from_info
from dswire.links import ROUTER
from dswire.messages import worker


class DecodeActor(Actor):
    """Performs what the machine asks for."""

    machine: DecodeState

    def __init__(self, machine: DecodeState, routes: list[Route], running: RunningInstance) -> None:
        super().__init__(machine, routes)
        self._running = running
        self._mapped = SegmentCache()
        #: of every sequence that runs
        self._samplers: dict[KvKey, SamplerState] = {}
        #: of every sequence that comes in chunks
        self._receivers: dict[KvKey, Receiver] = {}

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
        """Perform one action of ``dsdecode.events``."""
        match action:
            case RunDecode(runs):
                self.spawn(self._step(runs), "decode step")
            case CopyDirect():
                self.spawn(self._copy_direct(action), "copy")
            case CopyChunk():
                self.spawn(self._copy_chunk(action), "copy")
            case StartSequence():
                self._receivers.pop(action.key, None)
                self._samplers[action.key] = self._running.engine.sampler(
                    action.sampling, action.prompt_ids, action.output_ids
                )
            case ForgetSequence(key):
                self._samplers.pop(key, None)
                self._receivers.pop(key, None)
            case Ready():
                self.ready()
            case End(error):
                self.finish(from_info(error))
            case _:
                super().perform(action)

    async def _step(self, runs: tuple[DecodeRun, ...]) -> DecodeStepped:
        engine = self._running.engine
        items = [StepItem((one.token,), one.position, one.blocks, self._samplers[one.key]) for one in runs]
        began = self.now()
        results = await self._running.step(lambda: run_each(engine.step, items))
        pairs = [(one.key, result) for one, result in zip(runs, results, strict=True)]
        tokens = tuple(NextToken(key, r.token, logprobs(r)) for key, r in pairs if isinstance(r, Sampled))
        failed = tuple((key, r) for key, r in pairs if isinstance(r, ErrorInfo))
        now = self.now()
        return DecodeStepped(now, tokens, now - began, failed)

    async def _copy_direct(self, action: CopyDirect) -> CopyEnded:
        handle = action.handle

        def run() -> None:
            source = RankPools.map(handle.layout, handle.shards, handle.segment_blocks, self._mapped)
            receiver = self._receive(handle, action.blocks)
            receiver.copy_direct(source)
            receiver.verify()

        error = await self._running.copy(lambda: _error_of(run))
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

        error = await self._running.copy(lambda: _error_of(run))
        return CopyEnded(self.now(), handle.key, action.chunk, action.last, error)

    def _receive(self, handle: KvHandle, blocks: tuple[int, ...]) -> Receiver:
        return Receiver(handle, self._running.pools, blocks)


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
        name=name,
        node=instance.node,
        incarnation=uuid.uuid4().hex[:12],
        model=running.model,
        capacity=running.capacity,
        eos_ids=running.engine.model.eos_ids,
        max_queue=instance.max_queue,
        max_batch=instance.max_batch,
    )
    routes = [router_route(topology, name, config.incarnation), relay_route(topology, name)]
    return DecodeActor(DecodeState(config), routes, running)
