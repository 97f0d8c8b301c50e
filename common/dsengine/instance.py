"""The engine of one instance of a topology: loaded, identified, and run off the event loop.

Steps run in one thread and KV copies in another, each in the order in which they were asked for, so that a copy
neither waits for a step nor overtakes a copy that was asked for before it. A copy that takes less than the way to a
thread and back is made at once, unless the pool has a mirror. The other ranks of an instance hear of a
step when it is asked for, and need not wait for the end of those before it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog

from dsengine.collective import Collective
from dsengine.config import EngineConfig
from dsengine.configs import rank_configs, rank_segments
from dsengine.gpu_copies import GpuCopies
from dsengine.ipc import unreachable
from dsengine.model import load_shape
from dsengine.runner import Engine, StepItem
from dsengine.sampler import Sampled
from dsengine.store import resolve
from dskv.copying import SMALL_NBYTES
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.memory import RankPools
from dskv.pages import SPARE_NBYTES, MirrorPages
from dskv.receive import Receiver
from dskv.segment import SegmentCache
from dskv.shards import KvShard, copies, shards
from dskv.stage import of_layers
from dskv.transport import Transport
from dstopology.resolved import Instance, Topology
from dstopology.wiring import model_identity
from dswire.errors import DsError, ErrorInfo, OutOfMemory, StartFailed, TransferFailed
from dswire.messages.client import Sampling
from dswire.messages.kv import PoolInfo
from dswire.messages.worker import Capacity, Logprobs, ModelIdentity

if TYPE_CHECKING:
    from dsengine.rank_hosts import RankHosts
    from dsengine.spread import SpreadKv

T = TypeVar("T")
log = structlog.get_logger()

#: of the prompt that an instance reads before it serves
WARM_UP_TOKENS = 24


class RunningInstance:
    """Engine, pool and the two threads."""

    def __init__(
        self,
        engine: Engine,
        model: ModelIdentity,
        instance: Instance,
        collective: Collective | None = None,
        gpu: GpuCopies | None = None,
        hosts: RankHosts | None = None,
        spread: SpreadKv | None = None,
    ) -> None:
        self.engine = engine
        #: KV straight from other GPUs; there is nothing then that others map
        self.gpu = gpu
        #: to other instances, where the topology has KV take communicators
        self.collective = collective
        self.model = model
        self._instance = instance
        #: of ranks on other nodes, and their KV where it is handed over
        self._hosts = hosts
        self._spread = spread
        self._mapped = SegmentCache()
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="copy")
        #: asked for and not at their end
        self._copying = 0
        #: of the mirrors, where the pools have some
        self._pages: MirrorPages | SpreadKv | None = None
        if self.mirrored and spread is not None:
            self._pages = spread
        elif self.mirrored:
            self._pages = MirrorPages(self.pools, SPARE_NBYTES // engine.layout.block_nbytes)

    @classmethod
    async def load(cls, topology: Topology, instance: Instance, phase: Callable[[str], None]) -> RunningInstance:
        """Load the model, allocate the pool, take a first step. Raises what :class:`Engine` and the store raise."""
        phase("loading model")
        model_dir, blocks = await asyncio.to_thread(_model, topology, instance)
        model, hosts = model_identity(topology, model_dir), None
        if instance.hosts:
            from dsengine.rank_hosts import RankHosts

            hosts = RankHosts(topology, instance, model, blocks)
            phase(f"waiting for {' and '.join(host.name for host in instance.hosts)}, and loading model")
        try:
            by_gpu = await asyncio.to_thread(_by_gpu, topology)
            # what nobody else maps needs no file
            mapped = not by_gpu and (hosts is None or bool(topology.relays))
            configs = rank_configs(topology, instance, model_dir, blocks, mapped=mapped)
            engine, spread = await asyncio.to_thread(_engine, instance, configs, topology.run_dir, hosts)
        except BaseException:
            if hosts is not None:
                hosts.close()
            raise
        collective = Collective.of(topology, instance, engine.pool.device)
        gpu = GpuCopies(engine.pool.blocks, engine.layout) if by_gpu else None
        running = cls(engine, model, instance, collective, gpu, hosts, spread)
        phase("warming up")
        await asyncio.to_thread(running.warm_up)
        return running

    @property
    def shards(self) -> tuple[KvShard, ...]:
        """The pools of all ranks or their mirrors, as others of the host map them, or open the one of a GPU."""
        segments = list(map(str, rank_segments(self._instance)))
        every = shards(self.engine.layout, self._instance.tp, self._instance.pp, segments)
        if self.gpu is None:
            return every
        return tuple(msgspec.structs.replace(one, gpu=self.gpu.shared) for one in every)

    @property
    def near(self) -> PoolInfo:
        """What the relay can map: all, or the last stages where they are on several nodes."""
        layout, every = self.engine.layout, self.shards
        if self._hosts is not None:
            first = self._instance.runs[-1].first * self._instance.tp
            layout, every = of_layers(layout, every, (every[first].first_layer, every[-1].end_layer))
        return PoolInfo(layout, every, self.engine.pool.num_blocks)

    @cached_property
    def pools(self) -> RankPools:
        """The same, mapped into this process."""
        segment = self.engine.pool.segment
        if segment is not None and len(self.shards) == 1:
            return RankPools.of(self.engine.layout, segment)
        blocks = self.engine.pool.num_blocks
        return RankPools.map(self.engine.layout, self.shards, blocks, self._mapped, writable=True)

    @property
    def mirrored(self) -> bool:
        """Whether others map mirrors of the pools."""
        return self.engine.pool.mirror is not None

    @property
    def sealing(self) -> bool:
        """Whether KV has to be sealed even where nobody wants a checksum: what is not in the host's memory."""
        return self.mirrored or self.gpu is not None

    @property
    def capacity(self) -> Capacity:
        """The pool as the router is told."""
        return Capacity(self.engine.pool.num_blocks, self.engine.layout)

    @property
    def stages(self) -> int:
        """Steps that may be under way at once."""
        return self._instance.pp

    async def step(
        self, batch: Sequence[StepItem], then: Callable[[], None] | None = None
    ) -> list[Sampled | ErrorInfo | None]:
        """A step; when it fails as a whole, its items run alone, so that one bad sequence fails alone.

        ``then`` is called in the thread of steps, once the whole step is done.
        """
        try:
            end = self.engine.launch(batch)
            return await asyncio.get_running_loop().run_in_executor(self._steps, _ended, end, then)
        except DsError as error:
            await self.unless_lost()
            if len(batch) == 1:
                return [error.info()]
        return [(await self.step([item]))[0] for item in batch]

    async def unless_lost(self) -> None:
        """For whom something failed. Does not return when the ranks are lost: the process is about to end, and what
        it held is tried elsewhere."""
        if self.engine.lost is not None:
            await asyncio.Future()

    def warm_up(self) -> None:
        """Read a short prompt and decode a token. Blocks; raises what steps raise, and gives everything back then.

        What happens once would happen in somebody's first request otherwise: memory of its own for the kernels, at
        all ranks, and the first look at weights that came from the disk a moment ago, which costs a virtual machine
        more than reading them did.
        """
        engine = self.engine
        room = min(engine.model.max_model_len, engine.pool.num_blocks * engine.layout.block_size)
        count = min(WARM_UP_TOKENS, room - 1)
        blocks = tuple(range(engine.layout.blocks_for(count + 1)))
        try:
            for tokens, start in (((0,) * count, 0), ((0,), count)):
                if tokens:
                    sampler = engine.sampler(Sampling(seed=0), tokens, ())
                    self._steps.submit(engine.launch([StepItem(tokens, start, blocks, sampler)])).result()
        except BaseException:
            self.close()
            raise

    def seal_soon(self, key: KvKey, blocks: tuple[int, ...], *, summed: bool) -> Future[int]:
        """Have the thread of copies :meth:`seal`; may be asked for in any thread."""
        return self._copies.submit(partial(self.seal, key, blocks, summed=summed))

    def seal(self, key: KvKey, blocks: tuple[int, ...], *, summed: bool) -> int:
        """Have others see what lies in ``blocks``, until :meth:`withdraw`; their checksum if it is wanted.

        Blocks; raises why it cannot be.
        """
        if self.gpu is not None:
            return self.gpu.seal(blocks, summed=summed)
        if self._pages is not None:
            self._pages.hold(key, blocks)
            try:
                self.engine.mirror(blocks, "out")
            except BaseException:
                self._pages.let_go(key)
                raise
        if not summed:
            return 0
        return self.pools.checksum(blocks) if self._spread is None else self._spread.checksum(blocks)

    def withdraw(self, key: KvKey) -> None:
        """Nobody will read the blocks of ``key``, which may have been sealed."""
        if self._pages is not None:
            self._copies.submit(self._pages.let_go, key)

    def read_rate(self, owner: str, pool: PoolInfo | None, meeting: str) -> float:
        """Bytes per second out of the pool of another GPU, or from ``owner``, who is met.

        Blocks; raises :class:`TransferFailed`.
        """
        if meeting and self.collective is not None:
            return self.collective.read_rate(owner, meeting)
        if pool is None or self.gpu is None:
            raise TransferFailed("this instance does not read from GPUs", remedy="start all with the same topology")
        return self.gpu.read_rate(owner, pool)

    def bring(self, transport: Transport, handle: KvHandle, blocks: tuple[int, ...], *, summed: bool) -> None:
        """Have the KV of ``handle`` in ``blocks``, verified where it is ``summed``; for a thread that may wait.

        Raises why it cannot be.
        """
        if self.gpu is not None:
            self.gpu.fetch(handle, blocks, summed=summed)
            return
        with self._arriving(handle.key, blocks[: self.engine.layout.blocks_for(handle.tokens)]):
            if self._spread is not None:
                self._spread.bring(handle, blocks, summed=summed)
                return
            receiver = Receiver(handle, self.pools, blocks, summed=summed)
            transport.bring(receiver)
            receiver.verify()

    @contextlib.contextmanager
    def _arriving(self, key: KvKey, blocks: tuple[int, ...]) -> Iterator[None]:
        """What is written to the pools that others map is in ``blocks`` after the context."""
        if self._pages is None:
            yield
            return
        self._pages.hold(key, blocks)
        try:
            yield
            self.engine.mirror(blocks, "in")
        finally:
            self._pages.let_go(key)

    def copy(self, nbytes: int, run: Callable[[], T]) -> asyncio.Future[T]:
        """Begin at once: in the copy thread, or here where ``nbytes`` are few and no copy is before them."""
        loop = asyncio.get_running_loop()
        # what other nodes have to do is waited for in a thread
        if nbytes <= SMALL_NBYTES and not self._copying and not self.sealing and self._spread is None:
            made: asyncio.Future[T] = loop.create_future()
            made.set_result(run())
            return made
        self._copying += 1
        copying = loop.run_in_executor(self._copies, run)
        copying.add_done_callback(self._copied)
        return copying

    def _copied(self, _: object) -> None:
        self._copying -= 1

    def close(self) -> None:
        """End the threads after what they are at, and give the memory back."""
        lost = self.engine.lost is not None
        if self.collective is not None:
            self.collective.close()
        # a step may wait for ranks that are gone, for longer than this process is to live
        self._steps.shutdown(wait=not lost)
        self._copies.shutdown()
        self._mapped.close()
        if self._spread is not None:
            self._spread.close()
        if self.gpu is not None:
            self.gpu.close()
        if lost:
            self.engine.abandon()
        else:
            self.engine.close()
        if self._hosts is not None:
            self._hosts.close()


def _by_gpu(topology: Topology) -> bool:
    """Whether KV goes from GPU to GPU here, which the processes of all instances find alike.

    Raises :class:`StartFailed` where it has to and cannot.
    """
    if not topology.between_gpus:
        return False
    reason = unreachable([one.devices[0] for one in topology.instances])
    if reason is None:
        return True
    if topology.force_transport is not None:
        raise StartFailed(f"cuda_ipc is forced, and {reason}", remedy="leave force_transport out")
    log.warning("KV goes by way of the host's memory", why=reason)
    return False


def _ended(
    end: Callable[[], list[Sampled | None]], then: Callable[[], None] | None
) -> list[Sampled | ErrorInfo | None]:
    made = end()
    if then is not None:
        then()
    return list(made)


def _model(topology: Topology, instance: Instance) -> tuple[Path, int]:
    """Its directory, and the blocks of the instance's pool."""
    model_dir = resolve(topology.model.path)
    shape = load_shape(model_dir)
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, instance.block_size, topology.model.dtype)
    return model_dir, instance.kv_blocks or _blocks(instance, layout)


def _engine(
    instance: Instance, configs: Sequence[EngineConfig], run_dir: Path, hosts: RankHosts | None
) -> tuple[Engine, SpreadKv | None]:
    """The engine, and its KV where ranks on other nodes have some that others map."""
    if len(configs) == 1:
        return Engine(configs[0]), None
    from dsengine.ranks import RankedEngine
    from dsengine.rendezvous import Rendezvous

    rendezvous = Rendezvous(run_dir, instance.name)
    engine = RankedEngine(instance.name, configs, instance.tp, instance.pp, rendezvous, hosts)
    if hosts is None or configs[0].segment is None:
        return engine, None
    from dsengine.spread import SpreadKv

    return engine, SpreadKv(engine, instance)


def _blocks(instance: Instance, layout: KvLayout) -> int:
    block = layout.block_nbytes * copies(layout.kv_heads, instance.tp)
    blocks = instance.kv_memory_nbytes // block
    if blocks < 1:
        raise OutOfMemory(
            f"{instance.name}: kv.memory is {instance.kv_memory_nbytes} bytes, a block takes {block}",
            remedy="raise kv.memory in the topology",
        )
    return blocks


def logprobs(sampled: Sampled) -> Logprobs | None:
    """Log-probabilities as they travel."""
    return Logprobs(sampled.logprob, sampled.top) if sampled.logprob is not None else None
