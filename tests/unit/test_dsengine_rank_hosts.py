"""How rank hosts join an instance: late, with wrong keys, of another topology; and what their loss does."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import msgspec
import pytest
from zmq.auth.thread import ThreadAuthenticator

from dsengine import rank_hosts
from dsengine.configs import form_of
from dsengine.rank_hosts import RankHosts
from dsengine.rank_orders import RankMeet, RankStep, Report
from dskv.stream import SECRET_NBYTES
from dstopology.endpoints import free_ports
from dstopology.resolved import Topology
from dstopology.wiring import host_route
from dswire.actor import Route
from dswire.codec import encode
from dswire.errors import DsError, EngineFailed, ModelMismatch, StartFailed, Unauthorized, VersionMismatch
from dswire.keys import SYSTEM_PUBLIC, SYSTEM_SECRET, write_pair
from dswire.messages import PROTOCOL
from dswire.messages.ranks import (
    HostHello,
    HostMeet,
    HostPing,
    HostRefused,
    HostStart,
    HostStep,
    RankReported,
    RankSpan,
)
from dswire.messages.worker import ModelIdentity
from support.rebind import rebind
from support.topologies import Desk

PATIENCE_S = 60.0
MODEL = ModelIdentity("m", "f1", "float32")
BLOCKS = 8
TEXT = """
model: m
mode: colocated
nodes:
- {{name: a, devices: [cpu:0]}}
- {{name: b, devices: [cpu:0]}}
- {{name: c, devices: [cpu:0]}}
decode: {{pp: 3, place: [[a/cpu:0, b/cpu:0, c/cpu:0]]}}
ranks: {{port: {port}}}
security: {{curve: {curve}, keys: {keys}}}
"""


class World:
    """A topology's instance, in the loop of the test, and hosts without ranks."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._desk = Desk(directory)
        self._stack = stack
        self._port = free_ports()
        self.curve = "off"
        for name in ("keys", "other"):
            write_pair(directory / name / SYSTEM_SECRET, directory / name / SYSTEM_PUBLIC)

    def topology(self, keys: str = "keys") -> Topology:
        curve = self.curve if keys else "off"
        return self._desk.load(TEXT.format(port=self._port, curve=curve, keys=keys or "keys"))

    async def instance(self) -> RankHosts:
        topology = self.topology()
        hosts = await rebind(lambda: RankHosts(topology, topology.instances[0], MODEL, BLOCKS))
        self._stack.callback(hosts.close)
        return hosts

    def is_free(self) -> bool:
        """Whether nobody listens where the instance does."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) != 0

    def host(self, node: str, *, keys: str = "keys") -> Host:
        topology = self.topology(keys)
        host = Host(topology, f"decode-0-{node}")
        self._stack.callback(host.route.socket.close)
        return host


class Host:
    """The connection of a host."""

    def __init__(self, topology: Topology, name: str) -> None:
        self.route: Route = host_route(topology, topology.host(name), uuid.uuid4().hex, "instance")
        self.links: asyncio.Queue[bool] = asyncio.Queue()
        self.denied: asyncio.Queue[DsError] = asyncio.Queue()
        self._came: asyncio.Queue[msgspec.Struct] = asyncio.Queue()
        self.route.on_link, self.route.on_denied = self.links.put_nowait, self.denied.put_nowait
        self.route.socket.start(lambda _, frames: self._came.put_nowait(self.route.decoder.decode(frames[0])))
        self.hello = HostHello(PROTOCOL, name, "link", MODEL, form_of(topology, topology.instances[0]))

    async def join(self, **other: object) -> Host:
        """Say hello, perhaps with something ``other`` in it."""
        self.send(msgspec.structs.replace(self.hello, **other))
        return self

    def send(self, message: msgspec.Struct) -> None:
        self.route.socket.send("", [encode(message)])

    async def next(self) -> msgspec.Struct:
        """What comes next, but for pings."""
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(message := await self._came.get(), HostPing):
                pass
        return message


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


async def begun(world: World) -> tuple[RankHosts, list[Host], SimpleQueue[tuple[int, Report]]]:
    """An instance all of whose hosts have joined."""
    hosts, reports = await world.instance(), SimpleQueue[tuple[int, Report]]()
    takers = {rank: lambda report, rank=rank: reports.put((rank, report)) for rank in (0, 1)}
    each = [await world.host(node).join() for node in ("a", "b")]
    await asyncio.to_thread(hosts.begin, takers)
    for one in each:
        assert await one.next() == HostStart("link", BLOCKS, hosts.wiring.secret)
    return hosts, each, reports


async def test_an_instance_waits_for_all_and_talks_to_each(world: World) -> None:
    hosts, (first, second), reports = await begun(world)
    assert hosts.ranks == {0, 1}
    assert hosts.wiring.secret == b""
    await asyncio.to_thread(hosts.meet, 0, RankMeet("there"))
    assert await first.next() == HostMeet("link", 0, "there")
    await asyncio.to_thread(hosts.step, RankStep((RankSpan((1,), 0, (0,)),), (0,)))
    for one in (first, second):
        assert await one.next() == HostStep("link", (RankSpan((1,), 0, (0,)),), (0,))
    # of an earlier connection, of another's rank
    second.send(RankReported("before", 1, "ready"))
    second.send(RankReported("link", 7, "ready"))
    second.send(RankReported("link", 1, "joining", "here"))
    assert await asyncio.to_thread(reports.get, timeout=PATIENCE_S) == (1, Report("joining", where="here"))
    assert reports.empty()


async def test_a_host_that_is_late_is_waited_for(world: World) -> None:
    hosts = await world.instance()
    beginning = asyncio.create_task(asyncio.to_thread(hosts.begin, {}))
    first = await world.host("a").join()
    # its hello is read before that of the second is sent
    await (await world.host("b").join(form="other")).next()
    assert not beginning.done()
    await world.host("b").join()
    await asyncio.wait_for(beginning, PATIENCE_S)
    assert isinstance(await first.next(), HostStart)


async def test_who_never_joins_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_hosts, "LOAD_S", 0.01)
    hosts = await world.instance()
    with pytest.raises(StartFailed, match="decode-0-a on a, decode-0-b on b"):
        await asyncio.to_thread(hosts.begin, {})


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"protocol": PROTOCOL + 1}, VersionMismatch),
        ({"form": "other"}, ModelMismatch),
        ({"name": "decode-9-b"}, ModelMismatch),
        ({"model": msgspec.structs.replace(MODEL, fingerprint="f2")}, ModelMismatch),
    ],
)
async def test_who_does_not_fit_is_refused(world: World, other: dict[str, object], error: type[DsError]) -> None:
    await world.instance()
    refused = await (await world.host("b").join(**other)).next()
    assert isinstance(refused, HostRefused)
    assert refused.error.code == error.code


async def test_who_has_no_key_is_told_and_who_has_another_gets_no_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it guards against keys of clients, of which there are none here, and from the first connection on
    asked: list[bool] = []

    def ask(_: Path, *, clients: bool) -> ThreadAuthenticator:
        asked.append(clients)
        assert world.is_free()
        return ThreadAuthenticator()

    monkeypatch.setattr(rank_hosts, "start_authenticator", ask)
    world.curve = "on"
    hosts = await world.instance()
    assert asked == [False]
    assert not world.is_free()
    assert len(hosts.wiring.secret) == SECRET_NBYTES
    plain, other = world.host("a", keys=""), world.host("b", keys="other")
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await plain.denied.get(), Unauthorized)
    await world.host("a").join()
    await other.join()
    monkeypatch.setattr(rank_hosts, "LOAD_S", 0.5)
    with pytest.raises(StartFailed, match="decode-0-b on b"):
        await asyncio.to_thread(hosts.begin, {})
    # each try ends as it began
    assert not any(other.links.get_nowait() for _ in range(other.links.qsize()))


@pytest.mark.parametrize("how", ["closed", "joined again"])
async def test_the_loss_of_a_host_is_that_of_its_ranks(world: World, how: str) -> None:
    _, (_, second), reports = await begun(world)
    if how == "closed":
        second.route.socket.close()
    else:
        await second.join(link="another")
    rank, report = await asyncio.to_thread(reports.get, timeout=PATIENCE_S)
    assert (rank, report.state) == (1, "failed")
    assert report.error is not None
    assert report.error.code == EngineFailed.code
    assert report.error.message.startswith("decode-0-b, which runs ranks of decode-0,")


async def test_a_host_is_told_when_the_connection_is_there_and_when_it_is_gone(world: World) -> None:
    host, hosts = world.host("a"), await world.instance()
    async with asyncio.timeout(PATIENCE_S):
        assert await host.links.get()
        hosts.close()
        assert not await host.links.get()
        await world.instance()
        assert await host.links.get()
