"""A prompt that one instance reads and another goes on from, without services between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsengine.instance import RunningInstance
from dsengine.runner import StepItem
from dsengine.sampler import Sampled
from dskv.handle import KvHandle, KvKey
from dskv.segment import SegmentCache
from dskv.transport import SharedMemory
from dstopology.resolved import Topology
from dswire.messages.client import Sampling

KEY = KvKey("r/0", 0)


async def load(topology: Topology, name: str, device: str = "cpu:0") -> RunningInstance:
    """An instance, on another device than the topology says."""
    instance = topology.instance(name)
    on_device = dataclasses.replace(instance, devices=(device,) * len(instance.devices))
    return await RunningInstance.load(topology, on_device, lambda _: None)


async def generate(owner: RunningInstance, reader: RunningInstance, prompt: Sequence[int], count: int) -> list[int]:
    """The first token is ``owner``'s, the others ``reader``'s, in other blocks than they had there."""
    layout = owner.engine.layout
    handle, first = await offered(owner, prompt)
    blocks = tuple(range(5, 5 + layout.blocks_for(len(prompt) + count)))
    mapped = SegmentCache()
    reader.bring(SharedMemory(handle, mapped), handle, blocks, summed=True)
    mapped.close()
    owner.withdraw(KEY)
    made = [first]
    sampler = reader.engine.sampler(Sampling(temperature=0.0), prompt, made)
    while len(made) < count:
        position = len(prompt) + len(made) - 1
        made.append(await _step(reader, StepItem(made[-1:], position, blocks, sampler)))
    return made


async def offered(owner: RunningInstance, prompt: Sequence[int]) -> tuple[KvHandle, int]:
    """The KV of ``prompt``, sealed, and the first token."""
    layout = owner.engine.layout
    blocks = tuple(range(2, 2 + layout.blocks_for(len(prompt))))
    sampler = owner.engine.sampler(Sampling(temperature=0.0), prompt, ())
    first = await _step(owner, StepItem(prompt, 0, blocks, sampler))
    checksum = owner.seal_soon(KEY, blocks, summed=True).result()
    capacity = owner.capacity.blocks
    return KvHandle(KEY, "prefill-0", "n0", layout, len(prompt), blocks, owner.shards, capacity, checksum), first


async def _step(running: RunningInstance, item: StepItem) -> int:
    (made,) = await running.step([item])
    assert isinstance(made, Sampled)
    return made.token
