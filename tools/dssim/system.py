"""A whole system under a virtual clock: the processes of a topology, wired as the real ones are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from dsdecode.config import DecodeConfig
from dsdecode.state import DecodeState
from dskv.layout import KvLayout
from dskv.shards import shards
from dsprefill.state import PrefillConfig, PrefillState
from dsrelay.config import RelayConfig
from dsrelay.state import RelayState
from dsrouter.config import RouterConfig
from dsrouter.state import RouterState
from dssim.client import PEER, Client
from dssim.decoding import DecodeProcess
from dssim.failure import Failure
from dssim.kernel import Kernel
from dssim.processes import PrefillProcess, Process, RelayProcess, RouterProcess, Way
from dssim.prompts import VOCABULARY
from dssim.records import Observations, Record, Run
from dssim.times import StepTimes, TransferTimes
from dssim.workload import Arrival
from dstopology.resolved import LOCAL, Instance, Topology
from dswire.messages import kv, worker

#: longest simulated time for all processes to find each other, and for all to be given back after the last end
SETTLE_S = 120.0


class Silent:
    """The router's writer: tokens of a simulation have no text."""

    def push(self, token: int) -> tuple[str, bool]:
        """No text, no stop string."""
        return "", False

    def flush(self) -> str:
        """No text."""
        return ""

    def token_text(self, token: int) -> str:
        """No text."""
        return ""


class System:
    """Built from a topology; runs one workload."""

    def __init__(
        self,
        topology: Topology,
        layout: KvLayout,
        times: Callable[[Instance], StepTimes],
        transfers: TransferTimes,
        *,
        validate: bool = False,
        keep_steps: bool = False,
        single_steps: bool = False,
    ) -> None:
        """``layout``: of a KV block. ``validate``: check every machine after every event (slow).

        ``single_steps``: tell the machines of every step when it ends, even where nothing happens (slow).

        Raises what ``times`` raises.
        """
        self.topology = topology
        self.kernel = Kernel()
        self.seen = Observations(keep_steps)
        self.processes: dict[str, Process] = {}
        self._model = worker.ModelIdentity(topology.model.name, "simulated", topology.model.dtype)
        self._layout = layout
        self._times = times
        self._transfers = transfers
        self._validate = validate
        self._single_steps = single_steps
        #: processes made so far, and the last of each name
        self._made = 0
        self._last: dict[str, Process] = {}
        self.router = self._router()
        for relay in topology.relays:
            self._make(relay.name)
        for instance in topology.instances:
            self._make(instance.name)
        for process in self.processes.values():
            self._connect(process)
        way_s = transfers.message_s(False)
        self.client = Client(self.kernel, self.router, way_s, topology.router.client_lease_s)
        self.router.clients[PEER] = (self.client, way_s)
        for process in self.processes.values():
            process.start()

    def run(
        self,
        arrivals: Sequence[Arrival],
        on_end: Callable[[Record], None] = lambda record: None,
        failures: Sequence[Failure] = (),
    ) -> Run:
        """Serve a workload to its last end; ``on_end`` is told of each. To be called once."""
        kernel, client = self.kernel, self.client
        client.on_end = on_end
        began, began_cpu = time.perf_counter(), time.process_time()
        begun_s = self.begin()
        for failure in failures:
            kernel.at(begun_s + failure.at_s, self._kill, failure)
        client.submit_all(arrivals)
        while not client.done:
            kernel.step()
        ended_s = max((one.at_s + one.total_s for one in client.records), default=0.0)
        self._until(lambda: not self.held())
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        return Run(tuple(client.records), ended_s, begun_s, wall_s, cpu_s, kernel.steps, self.seen, self.held())

    def begin(self) -> float:
        """Let the processes find each other; the time at which they have."""
        self._until(lambda: all(one.ready for one in self.processes.values()))
        return self.kernel.now

    def held(self) -> dict[str, int]:
        """Whatever a process keeps for some request: name of the thing -> how many, zeros left out."""
        found: dict[str, int] = {}
        for name, process in self.processes.items():
            for thing, count in _held(process.machine).items():
                if count:
                    found[f"{name}: {thing}"] = count
        return found

    def _until(self, reached: Callable[[], bool]) -> None:
        end = self.kernel.now + SETTLE_S
        while not reached() and self.kernel.now < end:
            self.kernel.step()

    # failures

    def _kill(self, failure: Failure) -> None:
        gone = self.processes.pop(failure.name)
        gone.settle()
        gone.alive = False
        self.seen.failures.append((self.kernel.now, gone.name, False))
        if failure.down_s is not None:
            self.kernel.after(failure.down_s, self._revive, gone)

    def _revive(self, gone: Process) -> None:
        made = self._make(gone.name)
        self.seen.failures.append((self.kernel.now, made.name, True))
        self._connect(made)
        # those that opened a connection to it find it under the same address
        for process in self.processes.values():
            for name, way in list(process.peers.items()):
                if way.other is gone and way.ours:
                    self._join(process, name, made, way.us)
        made.start()
        if isinstance(made, RelayProcess):
            # what a process had queued for it died with that process
            for peer, message in gone.unread:
                if peer in made.peers:
                    made.arrive(peer, message)

    # processes

    def _make(self, name: str) -> Process:
        self._made += 1
        instance = next((one for one in self.topology.instances if one.name == name), None)
        made = self._relay(name) if instance is None else self._instance(instance, self._times(instance))
        return self._keep(made)

    def _keep(self, made: Process) -> Process:
        if self._validate:
            made.check = made.machine.validate
        self.processes[made.name] = self._last[made.name] = made
        return made

    @property
    def _incarnation(self) -> str:
        return f"simulated-{self._made}"

    def _router(self) -> RouterProcess:
        router = self.topology.router
        config = RouterConfig.of(self.topology, "simulated", self._model, VOCABULARY)
        writer = Silent()
        machine = RouterState(config, lambda sampling, prompt_ids: writer, Random(0), self.kernel.now)
        process = RouterProcess(router.name, router.node, machine, self.kernel, self._transfers)
        process.ready = True
        self._keep(process)
        return process

    def _relay(self, name: str) -> Process:
        relay = self.topology.relay(name)
        config = RelayConfig(
            name=name,
            node=relay.node,
            incarnation=self._incarnation,
            lease_s=relay.lease_s,
            transfer_timeout_s=relay.transfer_timeout_s,
            sources=self.topology.sources_of(relay.node),
            verify=relay.verify,
            direct=self.topology.transport(relay.node, relay.node) in LOCAL,
            keep=str(relay.keep),
            keep_nbytes=relay.keep_nbytes,
        )
        return RelayProcess(name, relay.node, RelayState(config), self.kernel, self._transfers)

    def _instance(self, instance: Instance, times: StepTimes) -> Process:
        layout = self._layout
        if instance.block_size != self.topology.instances[0].block_size:
            layout = msgspec.structs.replace(layout, block_size=instance.block_size)
        blocks = instance.kv_blocks or instance.kv_memory_nbytes // layout.block_nbytes
        name, node = instance.name, instance.node
        settings: dict[str, Any] = {
            "name": name,
            "node": node,
            "incarnation": self._incarnation,
            "model": self._model,
            "capacity": worker.Capacity(blocks, layout),
            "eos_ids": frozenset(),
            "max_queue": instance.max_queue,
            "max_batch": instance.max_batch,
            "max_batch_tokens": instance.max_batch_tokens,
            "stages": instance.pp,
            "prefix_cache": instance.prefix_cache,
        }
        parts = (self.kernel, self._transfers)
        if instance.role == "prefill":
            pool = shards(layout, 1, 1, [str(instance.segment)])
            reads = PrefillConfig(
                **settings,
                shards=pool,
                near=kv.PoolInfo(layout, pool, settings["capacity"].blocks),
                part_tokens=self.topology.part_tokens,
            )
            machine = PrefillState(reads)
            return PrefillProcess(name, node, machine, *parts, times=times, watch=self.seen)
        config = DecodeConfig(
            **settings,
            relayed=bool(self.topology.relays),
            prefill_priority=instance.prefill_priority,
            repeats=not self._single_steps,
        )
        return DecodeProcess(name, node, DecodeState(config), *parts, times=times, watch=self.seen)

    # connections

    def _connect(self, process: Process) -> None:
        """The connections that a process opens, in both directions, by the names that the real shells use."""
        if process is self.router:
            return
        self._join(process, "router", self.router, f"{process.name}/{self._made}")
        if isinstance(process, RelayProcess):
            for node in self.topology.sources_of(process.node):
                other = self._last[self.topology.relay_of(node).name]
                self._join(process, f"relay:{node}", other, f"fetcher:{process.name}")
        elif self.topology.relays:
            relay = self._last[self.topology.relay_of(process.node).name]
            self._join(process, "relay", relay, f"worker:{process.name}")

    def _join(self, one: Process, ones_name: str, other: Process, others_name: str) -> None:
        seconds = self._transfers.message_s(one.node == other.node)
        one.peers[ones_name] = Way(other, others_name, seconds, True)
        other.peers[others_name] = Way(one, ones_name, seconds, False)


def _held(machine: object) -> dict[str, int]:
    match machine:
        case RouterState():
            live = sum(request.live for request in machine.requests.values())
            return {"requests": live, "choices": len(machine.flow.choices)}
        case PrefillState() | DecodeState():
            return {"blocks": machine.pool.held, "sequences": len(machine.sequences)}
        case RelayState():
            transfers = len(machine.outgoing.transfers) + len(machine.incoming.transfers)
            kept = len(machine.keeper.kept)
            return {"handles": len(machine.ledger.handles), "transfers": transfers, "copies": kept}
    return {}
