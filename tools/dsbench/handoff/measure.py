"""What is measured of hand-offs. Each figure is the median of rounds in which it and its limit take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from statistics import median

import msgspec

from dsbench.handoff import limits
from dsbench.handoff.ends import LAYOUT, Reader
from dsbench.handoff.world import World
from dskv.handle import KvHandle
from dskv.receive import Receiver
from dskv.segment import Segment

#: seconds for ``nbytes``; the bytes lie in the reader's pool or are copied within it
Limit = Callable[[int], float]


class Transfer(msgspec.Struct, frozen=True):
    """How long hand-offs of one size take, and what the machine would allow."""

    transport: str
    bytes: int
    curve: bool
    #: from asking for the KV to having verified it; for ``copy`` the copy and its verification alone
    seconds: float
    bytes_per_s: float
    limit_bytes_per_s: float
    ratio: float


class Cost(msgspec.Struct, frozen=True):
    """What a hand-off of a single block costs, in microseconds."""

    transport: str
    curve: bool
    #: from asking for the KV to having verified it
    pull_us: float
    #: of that: copying and verifying; None where the copy is not the reader's alone
    copy_us: float | None


class Verification(msgspec.Struct, frozen=True):
    """What verifying adds to the copy out of another process's pool."""

    bytes: int
    #: of one copy, and of one that is not verified
    seconds: float
    seconds_unverified: float
    #: share by which the first is longer
    overhead: float


class Crowd(msgspec.Struct, frozen=True):
    """Hand-offs a second with many handles wanted at once, beside few."""

    transport: str
    curve: bool
    handles: int
    few: int
    handles_per_s: float
    handles_per_s_few: float
    ratio: float


class Copies:
    """The copy out of another process's pool alone: no relay, no message."""

    def __init__(self, reader: Reader, source: Segment) -> None:
        self._reader = reader
        #: the owner's pool as the owner sees it: a plain copy needs its address
        self._source = source

    def run(self, handle: KvHandle, rounds: int) -> Transfer:
        """Copy and verify ``handle``, in turns with ``memcpy`` of as many bytes."""
        own = range(len(handle.blocks))
        target, origin = limits.address(self._reader.pool), limits.address(self._source)
        seconds, least = [], []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            self._reader.bring(Receiver(handle, self._reader.pools, own))
            seconds.append(time.perf_counter() - began)
            least.append(limits.memcpy_s(target, origin, handle.nbytes))
        return made("copy", handle.nbytes, False, seconds[1:], least[1:])

    def verification(self, handle: KvHandle, rounds: int) -> Verification:
        """Copy ``handle`` with and without a checksum, in turns."""
        took: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds + 1):
            for summed, seconds in took.items():
                began = time.perf_counter()
                own = range(len(handle.blocks))
                self._reader.bring(Receiver(handle, self._reader.pools, own, summed=summed))
                seconds.append(time.perf_counter() - began)
        verified, plain = median(took[True][1:]), median(took[False][1:])
        return Verification(handle.nbytes, verified, plain, verified / plain - 1)


async def transfers(world: World, transport: str, curve: bool, nbytes: int, rounds: int, limit: Limit) -> Transfer:
    """Whole hand-offs of about ``nbytes``, one after the other, in turns with ``limit``."""
    blocks = max(1, nbytes // LAYOUT.block_nbytes)
    seconds, least = [], []
    for _ in range(rounds + 1):
        handle = (await world.offer(1, blocks))[0]
        began = time.perf_counter()
        await world.reader.pull(handle, range(blocks))
        seconds.append(time.perf_counter() - began)
        least.append(await asyncio.to_thread(limit, handle.nbytes))
    # the first round is the warm-up
    return made(transport, blocks * LAYOUT.block_nbytes, curve, seconds[1:], least[1:])


async def cost(world: World, transport: str, curve: bool, rounds: int) -> Cost:
    """Hand-offs of one block, one after the other."""
    pulls, copies = [], []
    for handle in await world.offer(rounds, 1):
        began = time.perf_counter()
        await world.reader.pull(handle, [0])
        pulls.append(time.perf_counter() - began)
        await world.reader.settled(handle)
        if transport == "shm":
            receiver = Receiver(handle, world.reader.pools, [0])
            began = time.perf_counter()
            world.reader.bring(receiver)
            copies.append(time.perf_counter() - began)
    return Cost(transport, curve, median(pulls) * 1e6, median(copies) * 1e6 if copies else None)


async def crowd(world: World, transport: str, curve: bool, handles: int, few: int, rounds: int) -> Crowd:
    """``handles`` hand-offs of one block: all wanted at once, in turns with ``few`` at a time."""
    together: list[float] = []
    in_turn: list[float] = []
    for _ in range(rounds + 1):
        for at_once, rates in ((handles, together), (few, in_turn)):
            rates.append(handles / await _pull_all(world, await world.offer(handles, 1), at_once))
    rate, rate_few = median(together[1:]), median(in_turn[1:])
    return Crowd(transport, curve, handles, few, rate, rate_few, rate / rate_few)


async def _pull_all(world: World, handles: Sequence[KvHandle], at_once: int) -> float:
    gate, pool = asyncio.Semaphore(at_once), world.reader.pool

    async def one(at: int, handle: KvHandle) -> None:
        async with gate:
            await world.reader.pull(handle, [at % pool.slots])
            await world.reader.settled(handle)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for at, handle in enumerate(handles):
            tasks.create_task(one(at, handle))
    return time.perf_counter() - began


def made(transport: str, nbytes: int, curve: bool, seconds: Sequence[float], least: Sequence[float]) -> Transfer:
    """The medians of a measurement."""
    took, limit = median(seconds), median(least)
    return Transfer(transport, nbytes, curve, took, nbytes / took, nbytes / limit, limit / took)
