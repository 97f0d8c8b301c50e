"""The engine of one instance of a topology: loaded, identified, and run off the event loop.

Steps run in one thread and KV copies in another, each in the order in which they were asked for, so that a copy
neither waits for a step nor overtakes a copy that was asked for before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dsengine.config import EngineConfig
from dsengine.model import load_shape
from dsengine.runner import Engine
from dsengine.sampler import Sampled
from dsengine.store import resolve
from dskv.layout import KvLayout
from dskv.memory import RankPools
from dskv.segment import Segment
from dskv.shards import KvShard, shards
from dstopology.resolved import Instance, Topology
from dstopology.wiring import model_identity
from dswire.errors import DsError, ErrorInfo, OutOfMemory, StartFailed
from dswire.messages.worker import Capacity, Logprobs, ModelIdentity

T = TypeVar("T")
ItemT = TypeVar("ItemT")


class RunningInstance:
    """Engine, pool and the two threads."""

    def __init__(self, engine: Engine, model: ModelIdentity) -> None:
        self.engine = engine
        self.model = model
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="copy")

    @classmethod
    async def load(cls, topology: Topology, instance: Instance, phase: Callable[[str], None]) -> RunningInstance:
        """Load the model and allocate the pool. Raises what :class:`Engine` and the store raise."""
        phase("loading model")
        return await asyncio.to_thread(cls._load, topology, instance)

    @classmethod
    def _load(cls, topology: Topology, instance: Instance) -> RunningInstance:
        model_dir = resolve(topology.model.path)
        device = instance.devices[0]
        config = EngineConfig(
            model_dir=model_dir,
            dtype=topology.model.dtype,
            device="cpu" if device.startswith("cpu") else device,
            block_size=instance.block_size,
            num_blocks=instance.kv_blocks or _blocks(topology, instance, model_dir),
            segment=instance.segment,
            threads=instance.threads,
            max_model_len=topology.model.max_model_len,
        )
        return cls(Engine(config), model_identity(topology, model_dir))

    @property
    def segment(self) -> Segment:
        """The pool as others of the host map it."""
        segment = self.engine.pool.segment
        if segment is None:
            raise StartFailed("the KV pool of this device cannot be handed over yet", remedy="place it on cpu:N")
        return segment

    @property
    def shards(self) -> tuple[KvShard, ...]:
        """The pools of all ranks."""
        return shards(self.engine.pool.layout, 1, 1, [str(self.segment.path)])

    @property
    def pools(self) -> RankPools:
        """The same, mapped into this process."""
        return RankPools.of(self.engine.pool.layout, self.segment)

    @property
    def capacity(self) -> Capacity:
        """The pool as the router is told."""
        return Capacity(self.engine.pool.num_blocks, self.engine.pool.layout)

    @property
    def stages(self) -> int:
        """Steps that may be under way at once."""
        return 1

    async def step(self, run: Callable[[], T]) -> T:
        """Run in the step thread."""
        return await asyncio.get_running_loop().run_in_executor(self._steps, run)

    async def copy(self, run: Callable[[], T]) -> T:
        """Run in the copy thread."""
        return await asyncio.get_running_loop().run_in_executor(self._copies, run)

    def close(self) -> None:
        """End the threads after what they are at, and give the memory back."""
        self._steps.shutdown()
        self._copies.shutdown()
        self.engine.close()


def _blocks(topology: Topology, instance: Instance, model_dir: Path) -> int:
    shape = load_shape(model_dir)
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, instance.block_size, topology.model.dtype)
    blocks = instance.kv_memory_nbytes // layout.block_nbytes
    if blocks < 1:
        raise OutOfMemory(
            f"{instance.name}: kv.memory is {instance.kv_memory_nbytes} bytes, a block takes {layout.block_nbytes}",
            remedy="raise kv.memory in the topology",
        )
    return blocks


def run_each(
    run: Callable[[Sequence[ItemT]], list[Sampled | None]], batch: Sequence[ItemT]
) -> list[Sampled | ErrorInfo | None]:
    """Run a step; when it fails as a whole, run its items alone, so that one bad sequence fails alone."""
    try:
        return list(run(batch))
    except DsError as error:
        if len(batch) == 1:
            return [error.info()]
        return [run_each(run, [item])[0] for item in batch]


def logprobs(sampled: Sampled) -> Logprobs | None:
    """Log-probabilities as they travel."""
    return Logprobs(sampled.logprob, sampled.top) if sampled.logprob is not None else None
