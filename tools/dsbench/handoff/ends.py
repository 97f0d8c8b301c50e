"""The two ends of a hand-off for measurements: an owner of KV and a reader of it, without an engine.

They speak to real relays as prefill and decode instances do, and copy in a thread of their own as those do.
``python -m dsbench.handoff.ends`` is an owner in a process of its own: a line of standard input names how many
handles of how many blocks it is to offer, and for each it writes the handle as a line of JSON.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from dsdecode.transports import Transports
from dskv.copying import SMALL_NBYTES, copier
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import Segment, SegmentCache
from dstopology.resolved import Topology
from dswire.codec import Decoder, encode
from dswire.errors import Failed, from_info
from dswire.keys import CurveKeys, load_system
from dswire.membership import HELLO_RETRY_S
from dswire.messages import PROTOCOL, kv
from dswire.sockets import ConnectedSocket

if TYPE_CHECKING:
    from dsengine.collective import Collective

#: a block of SmolLM2-135M in bfloat16: 368,640 bytes
LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")
#: longest wait for any answer, in seconds
PATIENCE_S = 60.0


def scattered(count: int) -> list[int]:
    """The blocks 0 to ``count - 1`` as a pool deals them after a while: each once, neighbours apart."""
    step = next(step for step in range(max(1, count * 5 // 8), count + 2) if _coprime(step, count))
    return [at * step % count for at in range(count)]


def _coprime(one: int, other: int) -> bool:
    while other:
        one, other = other, one % other
    return one == 1


class End:
    """A worker's connection to its relay: says hello, answers pings, hands on everything else."""

    def __init__(self, endpoint: str, name: str, pool: Segment, keys: CurveKeys | None = None) -> None:
        self.name = name
        self.pool = pool
        self.pools = RankPools.of(LAYOUT, pool)
        self.mapped = SegmentCache(warm=True)
        self.welcome: kv.KvWelcome
        self._socket = ConnectedSocket(endpoint, name, keys=keys)
        self._decoder: Decoder[msgspec.Struct] = Decoder(kv.ToKvWorker)
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._welcomed = asyncio.Event()
        self._socket.start(self._on_frames)

    async def hello(self) -> None:
        """Register, again and again until the relay answers. Raises :class:`Failed`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self._welcomed.is_set():
                    self.send(kv.KvHello(PROTOCOL, self.name, "1"))
                    await asyncio.wait([asyncio.ensure_future(self._welcomed.wait())], timeout=HELLO_RETRY_S)
        except TimeoutError as error:
            raise Failed(f"{self.name}: the relay did not answer within {PATIENCE_S:g} s") from error

    def send(self, message: msgspec.Struct) -> None:
        """To the relay."""
        self._socket.send("", [encode(message)])

    def copy(self, nbytes: int, run: Callable[[], None]) -> asyncio.Future[None]:
        """Begin in the copy thread, or here where that takes longer to get there and back."""
        loop = asyncio.get_running_loop()
        if nbytes > SMALL_NBYTES:
            return loop.run_in_executor(self._copies, run)
        run()
        done = loop.create_future()
        done.set_result(None)
        return done

    def take(self, message: Any) -> None:
        """A message that concerns KV."""

    def close(self) -> None:
        """Vanish, and give the memory back."""
        self._socket.close()
        self._copies.shutdown()
        self.mapped.close()
        self.pool.close()

    def _on_frames(self, identity: str, frames: list[bytes]) -> None:
        match self._decoder.decode(frames[0]):
            case kv.KvPing():
                self.send(kv.KvPong())
            case kv.KvWelcome() as welcome:
                self.welcome = welcome
                self._welcomed.set()
            case message:
                self.take(message)


class Owner(End):
    """Offers handles over a filled pool."""

    def __init__(
        self,
        endpoint: str,
        node: str,
        pool: Segment,
        keys: CurveKeys | None = None,
        collective: Collective | None = None,
    ) -> None:
        """``collective``: by which it sends what the relay wants it to send."""
        super().__init__(endpoint, "prefill-0", pool, keys)
        self._node = node
        self._epoch = 0
        self._collective = collective
        self._offered: dict[KvKey, KvHandle] = {}

    def offer(self, first: int, blocks: int) -> KvHandle:
        """Offer ``blocks`` blocks, from the ``first`` of the scattered ones on."""
        self._epoch += 1
        every = scattered(self.pool.slots)
        mine = tuple(every[(first + at) % len(every)] for at in range(blocks))
        handle = KvHandle(
            key=KvKey(f"bench-{self._epoch}/0", self._epoch),
            owner=self.name,
            node=self._node,
            layout=LAYOUT,
            tokens=blocks * LAYOUT.block_size,
            blocks=mine,
            shards=self.pools.placement.shards,
            segment_blocks=self.pool.slots,
            checksum=self.pools.checksum(mine),
        )
        self._offered[handle.key] = handle
        self.send(kv.KvOffer(handle))
        return handle

    def take(self, message: Any) -> None:
        """Send, or forget."""
        match message:
            case kv.KvSend(key=key, reader=reader, number=number) if self._collective is not None:
                meeting, _ = self._collective.send(reader, self.pools.canonical(self._offered[key].blocks))
                self.send(kv.KvSending(key, number, meeting))
            case kv.KvRelease(key=key):
                del self._offered[key]

    def close(self) -> None:
        """Leave the readers, and vanish."""
        if self._collective is not None:
            self._collective.close()
        super().close()


class Reader(End):
    """Pulls handles into a pool of its own."""

    def __init__(self, topology: Topology, pool: Segment, keys: CurveKeys | None = None) -> None:
        instance = topology.instance("decode-0")
        super().__init__(topology.relay_of(instance.node).local, instance.name, pool, keys)
        self._node = instance.node
        copier()
        self._collective = communicators() if topology.collective else None
        self._transports = Transports(topology, self.mapped, self._collective)
        #: read before the relay's word
        self._unanswered: dict[KvKey, asyncio.Future[None]] = {}
        self._pulls: dict[KvKey, asyncio.Future[Any]] = {}

    async def pull(self, handle: KvHandle, blocks: Sequence[int]) -> None:
        """Fetch, copy and verify, as a decode instance does. Raises what went wrong."""
        receiver = Receiver(handle, self.pools, blocks)
        if self.welcome.early and handle.node == self._node:
            self._unanswered[handle.key] = asyncio.get_running_loop().create_future()
            copying = self.copy(handle.nbytes, lambda: self.bring(receiver))
            self.send(kv.KvPull(handle))
            await copying
            return
        self._pulls[handle.key] = word = asyncio.get_running_loop().create_future()
        self.send(kv.KvPull(handle))
        try:
            async with asyncio.timeout(PATIENCE_S):
                ticket = await word
                await self.copy(1 << 30, lambda: self.bring(receiver, ticket))
        finally:
            del self._pulls[handle.key]
        self.send(kv.KvPulled(handle.key))

    async def settled(self, handle: KvHandle) -> None:
        """Wait until the relay has had its word on what was pulled. Raises :class:`Failed`."""
        word = self._unanswered.get(handle.key)
        if word is None:
            return
        try:
            await asyncio.wait_for(word, PATIENCE_S)
        except TimeoutError as error:
            raise Failed(f"{self.name}: the relay says nothing for {PATIENCE_S:g} s") from error

    def take(self, message: Any) -> None:
        """To the pull that waits for it, or that has not waited."""
        if isinstance(message, kv.KvGrant) and message.key in self._unanswered:
            self.send(kv.KvPulled(message.key))
            self._unanswered.pop(message.key).set_result(None)
        word = self._pulls.get(message.key)
        if word is None or word.done():
            return
        match message:
            case kv.KvFailed(error=error):
                word.set_exception(from_info(error))
            case kv.KvGrant(ticket=ticket):
                word.set_result(ticket)

    def bring(self, receiver: Receiver, ticket: kv.Ticket | None = None) -> None:
        """Copy as the ticket says, without one straight out of the owner's pool, and verify."""
        self._transports.of(receiver.handle, ticket).bring(receiver)
        receiver.verify()

    def close(self) -> None:
        """Leave the owner, and vanish."""
        if self._collective is not None:
            self._collective.close()
        super().close()


def communicators() -> Collective:
    """Of this process, between CPUs."""
    import torch

    from dsengine.collective import Collective

    return Collective(torch.device("cpu"), "127.0.0.1", PATIENCE_S)


def filled_pool(path: Path, blocks: int) -> Segment:
    """A pool of which every page was written."""
    pool = Segment.create(path, blocks, LAYOUT.block_nbytes)
    for block in range(blocks):
        pool.slot(block)[:] = (block + 1).to_bytes(8, "little") * (LAYOUT.block_nbytes // 8)
    return pool


async def _own(
    endpoint: str, node: str, path: Path, blocks: int, keys: CurveKeys | None, *, collective: bool
) -> None:
    pool = filled_pool(path, blocks)
    owner = Owner(endpoint, node, pool, keys, communicators() if collective else None)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def offer(count: int, each: int) -> None:
        for at in range(count):
            sys.stdout.buffer.write(msgspec.json.encode(owner.offer(at * each, each)) + b"\n")
        sys.stdout.buffer.flush()

    def listen() -> None:
        for line in sys.stdin:
            count, each = map(int, line.split())
            loop.call_soon_threadsafe(offer, count, each)
        loop.call_soon_threadsafe(ended.set)

    try:
        await owner.hello()
        threading.Thread(target=listen, daemon=True).start()
        await ended.wait()
    finally:
        owner.close()


def main() -> None:
    """Be an owner: ``ENDPOINT NODE POOL BLOCKS TRANSPORT [KEYS]``, until standard input ends."""
    endpoint, node, path, blocks, transport, *where = sys.argv[1:]
    keys = load_system(Path(where[0])) if where else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_own(endpoint, node, Path(path), int(blocks), keys, collective=transport == "gloo"))


if __name__ == "__main__":
    main()
