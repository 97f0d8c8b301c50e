"""Scripted router, prefill and decode endpoints on real sockets, for a real relay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from dsdecode.transports import Transports
from dsengine.collective import Collective
from dskv.handle import KvHandle, KvKey
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import Segment, SegmentCache
from dstopology.resolved import Topology
from dswire.codec import Decoder, encode
from dswire.errors import DsError, KvCorrupt, from_info
from dswire.membership import HELLO_RETRY_S
from dswire.messages import PROTOCOL, kv, worker
from dswire.sockets import BoundSocket, ConnectedSocket
from support.gpu_memory import SharedMemory
from support.handles import LAYOUT, make_pool, offered

MessageT = TypeVar("MessageT", bound=msgspec.Struct)

#: no answer takes longer than this, in seconds, unless something is broken
PATIENCE_S = 30.0


class Endpoint:
    """A worker's connection to its relay: answers pings, keeps everything else for the test."""

    def __init__(self, endpoint: str, name: str, incarnation: str = "1") -> None:
        self.name = name
        self.incarnation = incarnation
        self.socket = ConnectedSocket(endpoint, name)
        self.welcome: kv.KvWelcome
        self._decoder: Decoder[msgspec.Struct] = Decoder(kv.ToKvWorker)
        self._inbox: list[msgspec.Struct] = []
        self._came = asyncio.Event()
        self.socket.start(self._on_frames)

    async def hello(self) -> None:
        """Register. Said again until answered, as instances do: a broken connection takes one with it."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.send(kv.KvHello(PROTOCOL, self.name, self.incarnation))
                try:
                    async with asyncio.timeout(HELLO_RETRY_S):
                        self.welcome = await self.expect(kv.KvWelcome)
                    return
                except TimeoutError:
                    continue

    def send(self, message: msgspec.Struct, frames: Sequence[bytes] = ()) -> None:
        """To the relay."""
        self.socket.send("", [encode(message), *frames])

    async def expect(self, *kinds: type[MessageT], key: KvKey | None = None) -> MessageT:
        """The first message of one of ``kinds`` that came, and that concerns ``key``; others are kept."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for message in self._inbox:
                    if isinstance(message, kinds) and key in (None, getattr(message, "key", None)):
                        self._inbox.remove(message)
                        return message
                self._came.clear()
                await self._came.wait()

    def take(self, message: msgspec.Struct) -> bool:
        """Answer a message at once; False leaves it to the test."""
        if isinstance(message, kv.KvPing):
            self.send(kv.KvPong())
            return True
        return False

    def close(self) -> None:
        """Vanish."""
        self.socket.close()

    def _on_frames(self, identity: str, frames: list[bytes]) -> None:
        message = self._decoder.decode(frames[0])
        if not self.take(message):
            self._inbox.append(message)
            self._came.set()


class Prefill(Endpoint):
    """Owns a pool, offers handles over it, and sends what it is asked for."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        node: str,
        directory: Path,
        *,
        incarnation: str = "1",
        gpus: SharedMemory | None = None,
    ) -> None:
        super().__init__(endpoint, name, incarnation)
        self.node = node
        self.pool = make_pool(directory / f"{name}.kv", 64)
        self.gpus = gpus
        self._gpu = gpus.copies(LAYOUT, self.pool) if gpus is not None else None
        #: where the KV of each handle lies
        self._offered: dict[KvKey, tuple[KvHandle, RankPools]] = {}
        #: to whom each was sent last
        self._readers: dict[KvKey, str] = {}
        self._collective = Collective(torch.device("cpu"), "127.0.0.1", PATIENCE_S)

    def offer(self, sequence: str, blocks: Sequence[int]) -> KvHandle:
        """Offer some blocks."""
        handle = offered(self.pool, sequence, blocks, owner=self.name, node=self.node)
        if self._gpu is not None:
            shard = msgspec.structs.replace(handle.shards[0], gpu=self._gpu.shared)
            checksum = self._gpu.seal(blocks, summed=True)
            handle = msgspec.structs.replace(handle, shards=(shard,), checksum=checksum)
        self.offer_from(RankPools.of(LAYOUT, self.pool), handle)
        return handle

    def offer_from(self, pools: RankPools, handle: KvHandle) -> None:
        """Offer what lies in ``pools``."""
        self._offered[handle.key] = handle, pools
        self.send(kv.KvOffer(handle))

    def take(self, message: msgspec.Struct) -> bool:
        """Send at once, and stop when the reader has gone."""
        if isinstance(message, kv.KvRelease) and message.reason != "pulled" and message.key in self._readers:
            self._collective.drop(self._readers[message.key])
        if isinstance(message, kv.KvMeet):
            self.send(kv.KvMeeting(message.reader, message.by, self._collective.meet()[0]))
            return True
        if not isinstance(message, kv.KvSend):
            return super().take(message)
        reader = self._readers[message.key] = message.reader
        handle, pools = self._offered[message.key]
        # whoever does not want it any more ends it
        meeting, _ = self._collective.send(reader, pools.canonical(handle.blocks))
        self.send(kv.KvSending(message.key, message.number, meeting))
        return True

    async def released(self, key: KvKey) -> str:
        """Why the relay gave the blocks back."""
        return (await self.expect(kv.KvRelease, key=key)).reason

    def close(self) -> None:
        """Vanish, pool and all."""
        super().close()
        self._collective.close()
        self.pool.close()


class Decode(Endpoint):
    """Pulls handles into a pool of its own."""

    def __init__(self, topology: Topology, name: str, directory: Path, gpus: SharedMemory | None = None) -> None:
        super().__init__(topology.relay_of(topology.instance(name).node).local, name)
        self.topology = topology
        self.pool = Segment.create(directory / f"{name}.kv", 256, LAYOUT.block_nbytes)
        self.pools = RankPools.of(LAYOUT, self.pool)
        self._collective = Collective(torch.device("cpu"), "127.0.0.1", PATIENCE_S)
        self._mapped = SegmentCache()
        self.transports = Transports(topology, self._mapped, self._collective)
        self._gpu = gpus.copies(LAYOUT, self.pool) if gpus is not None else None

    def take(self, message: msgspec.Struct) -> bool:
        """Try the owners that are met."""
        if not isinstance(message, kv.KvTry) or not message.meeting:
            return super().take(message)
        owner, loop = message.owner, asyncio.get_running_loop()
        trial = loop.run_in_executor(None, self._collective.read_rate, owner, message.meeting)
        trial.add_done_callback(lambda done: self.send(kv.KvTried(owner, done.result())))
        return True

    async def pull(
        self, handle: KvHandle, blocks: Sequence[int], *, doubt: Callable[[], None] = lambda: None
    ) -> None:
        """The whole of a pull, as a decode instance does it. Raises what went wrong.

        ``doubt`` is called when the checksum was wrong, before all is fetched once more.
        """
        self.send(kv.KvPull(handle))
        try:
            try:
                await self._fetch(handle, blocks)
            except KvCorrupt:
                doubt()
                self.send(kv.KvAgain(handle.key))
                await self._fetch(handle, blocks)
        except DsError as error:
            self.send(kv.KvPulled(handle.key, error.info()))
            raise
        self.send(kv.KvPulled(handle.key))

    async def _fetch(self, handle: KvHandle, blocks: Sequence[int]) -> None:
        answers: tuple[type[Any], ...] = (kv.KvGrant, kv.KvFailed)
        word: Any = await self.expect(*answers, key=handle.key)
        if isinstance(word, kv.KvFailed):
            raise from_info(word.error)
        await self.fetch(handle, word, blocks)

    async def fetch(self, handle: KvHandle, grant: kv.KvGrant, blocks: Sequence[int]) -> None:
        """What the relay has granted, verified. Raises what went wrong."""
        if self._gpu is not None:
            self._gpu.fetch(handle, blocks, summed=True)
            return
        receiver = Receiver(handle, self.pools, blocks)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.to_thread(self.transports.of(handle, grant.ticket).bring, receiver)
        receiver.verify()

    def close(self) -> None:
        """Vanish, pool and all."""
        super().close()
        self._collective.close()
        self.pool.close()
        self._mapped.close()


class ScriptedRouter:
    """Welcomes whoever says hello."""

    def __init__(self, endpoint: str) -> None:
        self._socket = BoundSocket(endpoint)
        self._decoder: Decoder[msgspec.Struct] = Decoder(worker.FromWorker)
        self.hellos: dict[str, worker.WorkerHello] = {}
        self._load: asyncio.Future[worker.Load] | None = None
        self._socket.start(self._on_frames)

    async def load(self, name: str) -> worker.Load:
        """What the worker ``name`` reports."""
        self._load = asyncio.get_running_loop().create_future()
        identity = next(identity for identity, hello in self.hellos.items() if hello.name == name)
        self._socket.send(identity, [encode(worker.RouterPing())])
        async with asyncio.timeout(PATIENCE_S):
            return await self._load

    def close(self) -> None:
        """Vanish."""
        self._socket.close()

    def _on_frames(self, identity: str, frames: list[bytes]) -> None:
        message = self._decoder.decode(frames[0])
        if isinstance(message, worker.WorkerHello):
            self.hellos[identity] = message
            self._socket.send(identity, [encode(worker.WorkerWelcome("router-0", "1", 60.0))])
        elif isinstance(message, worker.WorkerReport) and self._load is not None:
            self._load.set_result(message.load)
