"""A whole system in one loop: the real machines of every service, modelled work, connections and time.

Every machine is validated after every event. A seed decides all delays, so the same seed is the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from dsdecode.config import DecodeConfig
from dsdecode.state import DecodeState
from dskv.shards import shards
from dsprefill.state import PrefillConfig, PrefillState
from dsrelay.config import RelayConfig
from dsrelay.state import RelayState
from dsrouter.config import RouterConfig
from dsrouter.state import RouterState
from dswire.errors import ErrorInfo
from dswire.machine import Tick
from dswire.messages import kv, worker
from support.handles import LAYOUT
from support.holdings import held_by
from support.instances import DecodeProcess, InstanceProcess, PrefillProcess
from support.kv_memory import KvMemory
from support.processes import Pace, Process, RelayProcess, RouterProcess
from support.raw_client import RawClient
from support.script import EOS, VOCAB, Script, ScriptWriter
from support.virtual_clock import VirtualClock
from support.wires import Wires

ROUTER = "router-0"
MODEL = worker.ModelIdentity("tiny", "f" * 64, "float16")
LEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Which processes there are, and how large."""

    #: node of each instance
    prefill: tuple[str, ...] = ("n0",)
    decode: tuple[str, ...] = ("n0",)
    #: whether KV may go by shared memory within a node
    direct: bool = True
    prefill_blocks: int = 64
    decode_blocks: int = 64
    prefill_batch: int = 8
    decode_batch: int = 16
    target_tokens: int = 64
    decode_tokens: int = 64
    mode: str = "disaggregated"
    threshold_tokens: int = 0
    stages: int = 1
    prefill_priority: bool = False
    prefix_cache: bool = True
    max_requests: int = 64
    #: sequences waiting at one prefill instance
    prefill_queue: int = 16
    decode_queue: int = 64
    #: KV goes to the decode instance of the same number, and to no other
    pairs: bool = False
    #: KV that is not read directly is sent by communicators
    collective: str = ""
    #: KV of prompts that are longer than a step goes in parts, which end at multiples of so many tokens
    part_tokens: int = 0
    #: blocks of KV that each relay keeps for readers that die
    keep_blocks: int = 0
    retries: int = 2
    node_affinity: float = 4.0
    lease_s: float = LEASE_S
    transfer_timeout_s: float = 5.0
    client_lease_s: float = 6.0
    worker_lease_s: float = 5.0
    max_deadline_s: float = 120.0
    #: what workers say that they serve, where it is not the router's model
    models: dict[str, worker.ModelIdentity] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node."""
        return tuple(dict.fromkeys((*self.prefill, *self.decode)))

    @property
    def roles(self) -> dict[str, str]:
        """Role of each worker, by name."""
        relays = () if self.mode == "colocated" else self.nodes
        roles = {f"relay-{node}": "relay" for node in relays}
        roles |= {f"prefill-{number}": "prefill" for number in range(len(self.prefill))}
        return roles | {f"decode-{number}": "decode" for number in range(len(self.decode))}

    @property
    def reach(self) -> dict[str, frozenset[str]]:
        """As the router has it."""
        return {f"prefill-{n}": frozenset({f"decode-{n}"}) for n in range(len(self.prefill))} if self.pairs else {}


TCP = Shape(direct=False)
PARTS = Shape(target_tokens=8, part_tokens=4)
GLOO = Shape(direct=False, collective="gloo")
TWO_NODES = Shape(prefill=("n0",), decode=("n1",))


class Cluster:
    """The system, and what tests do with it."""

    def __init__(self, shape: Shape | None = None, *, seed: int = 0, start: bool = True) -> None:
        self.shape = shape or Shape()
        self.clock = VirtualClock()
        self.random = Random(seed)
        self.memory = KvMemory()
        self.script = Script()
        self.pace = Pace()
        self.prefill_errors: dict[str, ErrorInfo] = {}
        self.tickets: dict[bytes, Process] = {}
        self.meetings: dict[str, Process] = {}
        self.wires = Wires(self.clock, self.random, lambda name: self.processes.get(name))
        #: the live processes, by name
        self.processes: dict[str, Process] = {}
        self.clients: dict[str, RawClient] = {}
        #: processes that ended by themselves
        self.endings: list[tuple[str, ErrorInfo]] = []
        self.trace: list[str] = []
        #: kinds of work that are held back, with what follows when they are let go
        self._holding: dict[str, list[Callable[[], None]]] = {}
        self._incarnations = 0
        #: the last process of each name
        self._started: dict[str, Process] = {}
        if start:
            for name in (ROUTER, *self.shape.roles):
                self.start(name)
            self.until(lambda: all(one.ready for one in self.processes.values()))

    # time

    @property
    def now(self) -> float:
        """The time."""
        return self.clock.now

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.clock.step(until):
            pass

    def until(self, reached: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Let time pass until something is so; fails when it is not so within ``limit_s``."""
        end = self.now + limit_s
        while not reached():
            assert self.clock.step(end), f"not reached in {limit_s} s:\n" + "\n".join(self.trace[-40:])

    def note(self, line: str) -> None:
        """Add to the trace."""
        self.trace.append(f"{self.now:.6f} {line}")

    def hold(self, kind: str) -> None:
        """Work of this kind (a field of ``Pace``) does not end before :meth:`release`."""
        self._holding.setdefault(kind, [])

    def release(self) -> None:
        """Let all work go that was held back."""
        holding, self._holding = self._holding, {}
        for end in [end for ends in holding.values() for end in ends]:
            self.clock.at(self.now, end)

    def finish(self, kind: str, end: Callable[[], None]) -> None:
        """A piece of work is done."""
        if kind in self._holding:
            self._holding[kind].append(end)
        else:
            end()

    # processes

    def start(self, name: str) -> Process:
        """Start a process that is not running."""
        assert name not in self.processes
        if name in self._started:
            self.memory.remove(self._started[name].segment)
            self.memory.remove(self._started[name].segment + ".keep")
        self._started[name] = self.processes[name] = made = self._make(name)
        self.wires.started(name)
        made.feed(Tick(self.now))
        return made

    def rival(self, name: str) -> Process:
        """Start a second process of a name that lives."""
        made = self._make(name)
        made.feed(Tick(self.now))
        return made

    def kill(self, name: str) -> None:
        """A process dies without a word."""
        self._gone(self.processes.pop(name))

    def restart(self, name: str) -> Process:
        """Kill and start again at once."""
        self.kill(name)
        return self.start(name)

    def stall(self, name: str, seconds: float) -> None:
        """A process stands still for a while; what comes meanwhile waits for it."""
        process = self.processes[name]
        process.stalled_until = max(process.stalled_until, self.now + seconds)

    def stop(self, name: str) -> None:
        """A worker ends orderly."""
        process = self.processes.pop(name)
        process.send("router", worker.WorkerBye(), [])
        self.clock.after(0.01, lambda: self._gone(process))

    def ended(self, process: Process, error: ErrorInfo) -> None:
        """A process ends by itself."""
        self.endings.append((process.name, error))
        if self.processes.get(process.name) is process:
            del self.processes[process.name]
        self._gone(process)

    def _gone(self, process: Process) -> None:
        self.note(f"{process.name}/{process.incarnation} is gone")
        process.alive = False
        self.wires.died(process)

    def _make(self, name: str) -> Process:
        self._incarnations += 1
        incarnation = str(self._incarnations)
        role = self.shape.roles.get(name, "router")
        self.memory.create(f"/shm/{name}/{incarnation}")
        self.memory.create(f"/shm/{name}/{incarnation}.keep")
        made = {"router": self._router, "relay": self._relay, "prefill": self._prefill, "decode": self._decode}[
            role
        ](name, incarnation)
        made.ready = role == "router"
        if role == "router":
            return made
        made.links["router"] = self.wires.connect(made, "router", ROUTER, f"{name}/{incarnation}")
        if role == "relay":
            for node in self._sources(self.node(name)):
                peer = f"relay:{node}"
                made.links[peer] = self.wires.connect(made, peer, f"relay-{node}", f"fetcher:{name}")
        elif self.shape.mode != "colocated":
            relay = f"relay-{self.node(name)}"
            made.links["relay"] = self.wires.connect(made, "relay", relay, f"worker:{name}")
        return made

    def node(self, name: str) -> str:
        """Where a worker runs."""
        role, _, place = name.partition("-")
        if role == "relay":
            return place
        return (self.shape.prefill if role == "prefill" else self.shape.decode)[int(place)]

    def _sources(self, node: str) -> tuple[str, ...]:
        return tuple(one for one in self.shape.nodes if one != node or not self.shape.direct)

    def _router(self, name: str, incarnation: str) -> Process:
        shape = self.shape
        config = RouterConfig(
            name=name,
            incarnation=incarnation,
            model=MODEL,
            vocab_size=VOCAB,
            max_model_len=4 * max(shape.prefill_blocks, shape.decode_blocks),
            workers=shape.roles,
            max_requests=shape.max_requests,
            max_prefill_queue=shape.prefill_queue,
            max_decode_queue=shape.decode_queue,
            max_deadline_s=shape.max_deadline_s,
            client_lease_s=shape.client_lease_s,
            worker_lease_s=shape.worker_lease_s,
            retries=shape.retries,
            node_affinity=shape.node_affinity,
            mode=shape.mode,
            threshold_tokens=shape.threshold_tokens,
            reach=shape.reach,
            keep_extend_s=shape.lease_s / 3 if shape.keep_blocks else 0.0,
        )
        machine = RouterState(config, ScriptWriter, Random(0), self.now)
        return RouterProcess(self, name, incarnation, machine)

    def _prefill(self, name: str, incarnation: str) -> Process:
        pool = shards(LAYOUT, 1, 1, [f"/shm/{name}/{incarnation}"])
        config = PrefillConfig(
            name=name,
            node=self.node(name),
            incarnation=incarnation,
            model=self.shape.models.get(name, MODEL),
            capacity=worker.Capacity(self.shape.prefill_blocks, LAYOUT),
            eos_ids=frozenset({EOS}),
            shards=pool,
            near=kv.PoolInfo(LAYOUT, pool, self.shape.prefill_blocks),
            part_tokens=self.shape.part_tokens,
            max_queue=self.shape.prefill_queue,
            max_batch=self.shape.prefill_batch,
            max_batch_tokens=self.shape.target_tokens,
            stages=self.shape.stages,
            prefix_cache=self.shape.prefix_cache,
        )
        return PrefillProcess(self, name, incarnation, PrefillState(config))

    def _decode(self, name: str, incarnation: str) -> Process:
        config = DecodeConfig(
            name=name,
            node=self.node(name),
            incarnation=incarnation,
            model=self.shape.models.get(name, MODEL),
            capacity=worker.Capacity(self.shape.decode_blocks, LAYOUT),
            eos_ids=frozenset({EOS}),
            max_queue=self.shape.decode_queue,
            max_batch=self.shape.decode_batch,
            max_batch_tokens=self.shape.decode_tokens,
            stages=self.shape.stages,
            prefix_cache=self.shape.prefix_cache,
            relayed=self.shape.mode != "colocated",
            prefill_priority=self.shape.prefill_priority,
        )
        return DecodeProcess(self, name, incarnation, DecodeState(config))

    def _relay(self, name: str, incarnation: str) -> Process:
        config = RelayConfig(
            name=name,
            node=self.node(name),
            incarnation=incarnation,
            lease_s=self.shape.lease_s,
            transfer_timeout_s=self.shape.transfer_timeout_s,
            sources=self._sources(self.node(name)),
            direct=self.shape.direct,
            collective=self.shape.collective,
            keep=f"/shm/{name}/{incarnation}.keep",
            keep_nbytes=self.shape.keep_blocks * LAYOUT.block_nbytes,
        )
        return RelayProcess(self, name, incarnation, RelayState(config))

    # who is who

    def client(self, name: str = "c") -> RawClient:
        """A client, made at its first use."""
        if name not in self.clients:
            self.clients[name] = RawClient(name, self.clock, self.wires, ROUTER)
        return self.clients[name]

    @property
    def router(self) -> RouterState:
        """The router's machine."""
        machine = self.processes[ROUTER].machine
        assert isinstance(machine, RouterState)
        return machine

    def prefill(self, number: int = 0) -> PrefillState:
        """A prefill machine."""
        machine = self.processes[f"prefill-{number}"].machine
        assert isinstance(machine, PrefillState)
        return machine

    def decode(self, number: int = 0) -> DecodeState:
        """A decode machine."""
        machine = self.processes[f"decode-{number}"].machine
        assert isinstance(machine, DecodeState)
        return machine

    def relay(self, node: str = "n0") -> RelayState:
        """A relay machine."""
        machine = self.processes[f"relay-{node}"].machine
        assert isinstance(machine, RelayState)
        return machine

    # what is held

    def held(self) -> dict[str, int]:
        """Whatever a process still keeps for some request: name of the thing -> how many, zeros left out."""
        found: dict[str, int] = {}
        for name, process in self.processes.items():
            for thing, count in held_by(process.machine).items():
                if count:
                    found[f"{name}: {thing}"] = count
        for name, process in self.processes.items():
            if isinstance(process, InstanceProcess) and process.tokens:
                found[f"{name}: samplers"] = len(process.tokens)
        streams = sum(process.alive for process in self.tickets.values())
        return {**found, "streams": streams} if streams else found

    def corrupt(self) -> list[str]:
        """Hand-offs whose checksum was wrong."""
        return [line for line in self.trace if " corrupt " in line]
