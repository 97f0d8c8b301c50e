"""Real relays in this process, with scripted workers around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsrelay.actor import RelayActor, build
from dsrelay.events import Action, Event
from dsrelay.state import RelayState
from dstopology.endpoints import free_ports
from dstopology.load import load
from dstopology.resolved import Relay, Topology
from dswire.errors import DsError, PortInUse
from support.gpu_memory import SharedMemory
from support.kv_workers import PATIENCE_S, Decode, Prefill, ScriptedRouter

#: how KV gets from prefill to decode: same host; by a relay's stream here, and there; by communicators; from GPU to
#: GPU, which are CPUs here
TRANSPORTS = ("shm", "tcp-self", "tcp-pair", "gloo-self", "gloo-pair", "cuda_ipc")

LEASE_S = 3.0
RELAY = "{lease_s: LEASE, transfer_timeout_s: 4, port: PORT}"
ONE_NODE = """
model: tiny
nodes: [{name: n0, host: 127.0.0.1, devices: [cpu:0, cpu:1]}]
router: {node: n0, frontend: "tcp://127.0.0.1:ROUTER"}
prefill: {place: [[n0/cpu:0]]}
decode: {place: [[n0/cpu:1]]}
relay: RELAY
"""
TWO_NODES = """
model: tiny
nodes:
  - {name: n0, host: 127.0.0.1, devices: [cpu:0]}
  - {name: n1, host: 127.0.0.2, devices: [cpu:0]}
router: {node: n0, frontend: "tcp://127.0.0.1:ROUTER"}
prefill: {place: [[n0/cpu:0]]}
decode: {place: [[n1/cpu:0]]}
relay: RELAY
"""


class CheckedRelay(RelayState):
    """Validates itself after every event."""

    def handle(self, event: Event) -> list[Action]:
        """Take one event."""
        actions = super().handle(event)
        self.validate()
        return actions


class WatchedActor(RelayActor):
    """Tells when it has refused a message; its machine validates itself."""

    def __init__(self, built: RelayActor) -> None:
        super().__init__(
            CheckedRelay(built.machine.config), built.routes, built._topology, built._streams, built._authenticator
        )
        self.news = asyncio.Event()

    def _complain(self, peer: str, error: DsError) -> None:
        super()._complain(peer, error)
        self.news.set()


@dataclass(slots=True)
class Running:
    """One relay under way."""

    relay: Relay
    actor: WatchedActor
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def state(self) -> RelayState:
        return self.actor.machine

    @property
    def local(self) -> str:
        """Where its workers connect."""
        return self.relay.local

    @property
    def data(self) -> str | None:
        """Where other relays connect."""
        return self.relay.data_connect

    async def refuses(self, count: int) -> None:
        """Wait until it has refused so many messages."""
        async with asyncio.timeout(PATIENCE_S):
            while self.actor.refused < count:
                await self.actor.news.wait()
                self.actor.news.clear()

    async def end(self) -> None:
        """Stop it in good order; raises whatever went wrong in it."""
        self.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.task

    def assert_idle(self) -> None:
        """No handle, no transfer is held."""
        assert not self.state.ledger.handles
        assert not self.state.outgoing.transfers
        assert not self.state.incoming.transfers


@dataclass(slots=True)
class World:
    """A router, the relays, one prefill and one decode."""

    topology: Topology
    router: ScriptedRouter
    relays: dict[str, Running] = field(default_factory=dict)
    prefill: Prefill = field(init=False)
    decode: Decode = field(init=False)

    async def start_relay(self, name: str) -> Running:
        """Start (again) the relay ``name``, and wait until it serves."""
        actor = await self._build(name)
        stop, ready = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(actor.run(stop, ready.set), name=name)
        self.relays[name] = running = Running(self.topology.relay(name), actor, stop, task)
        async with asyncio.timeout(PATIENCE_S):
            await ready.wait()
        return running

    async def _build(self, name: str) -> WatchedActor:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    return WatchedActor(await build(self.topology, name, lambda phase: None))
                except PortInUse:
                    # libzmq gives a closed socket's port back from a thread of its own
                    await asyncio.sleep(0.01)

    async def end_relay(self, name: str) -> None:
        """Stop the relay ``name`` in good order."""
        await self.relays[name].end()

    @property
    def owners_relay(self) -> Running:
        return self.relays[self.topology.relay_of(self.prefill.node).name]

    def assert_arrived(self, blocks: Sequence[int], own: Sequence[int]) -> None:
        """The decode pool holds what the prefill pool holds."""
        for theirs, mine in zip(blocks, own, strict=True):
            assert bytes(self.decode.pool.slot(mine)) == bytes(self.prefill.pool.slot(theirs))

    def assert_idle(self) -> None:
        """Nothing is held anywhere."""
        for running in self.relays.values():
            running.assert_idle()


def topology_for(transport: str, directory: Path, lease_s: float) -> Topology:
    """A topology that takes that transport, on free ports."""
    text = (TWO_NODES if transport.endswith("pair") else ONE_NODE).replace("RELAY", RELAY)
    if transport == "cuda_ipc":
        text = text.replace("cpu:", "cuda:")
    if transport in ("tcp-self", "gloo-self", "gloo-pair"):
        text += f"force_transport: {transport[:-5]}\n"
    first = free_ports(6)
    text = text.replace("PORT", str(first)).replace("ROUTER", str(first + 4)).replace("LEASE", str(lease_s))
    path = directory / "t.yaml"
    path.write_text(text)
    env = {"DS_RUN_DIR": str(directory / "run"), "DS_SHM_DIR": str(directory), "DS_HOME": str(directory)}
    (directory / "run").mkdir()
    return load(path, env)


@asynccontextmanager
async def running(transport: str, directory: Path, lease_s: float = LEASE_S) -> AsyncIterator[World]:
    """Everything up and registered; on leaving, everything down, and whatever went wrong is raised."""
    topology = topology_for(transport, directory, lease_s)
    async with AsyncExitStack() as stack:
        world = World(topology, ScriptedRouter(topology.router.backend_bind))
        stack.callback(world.router.close)
        for relay in topology.relays:
            await world.start_relay(relay.name)
            stack.push_async_callback(world.end_relay, relay.name)
        owner = topology.instance("prefill-0")
        gpus = SharedMemory() if topology.between_gpus else None
        assert (gpus is not None) == (transport == "cuda_ipc")
        world.prefill = Prefill(topology.relay_of(owner.node).local, "prefill-0", owner.node, directory, gpus=gpus)
        stack.callback(lambda: world.prefill.close())
        world.decode = Decode(topology, "decode-0", directory, gpus)
        stack.callback(world.decode.close)
        await world.prefill.hello()
        await world.decode.hello()
        yield world
