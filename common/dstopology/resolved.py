"""The resolved topology: everything that a process needs to know, nothing left to look up.

Made by :func:`dstopology.load.load`; all references are checked before one of these exists, so that
:meth:`Topology.instance` and its like fail only for a name that did not come from the same topology.
Times are seconds, sizes are bytes, addresses are ZeroMQ endpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Literal

from dstopology.endpoints import Tcp
from dswire.errors import TopologyError

Role = Literal["router", "prefill", "decode", "relay", "rankhost", "gateway"]
#: ways that the relays only keep the books of
LOCAL = ("shm", "cuda_ipc")
Transport = Literal["shm", "tcp", "gloo", "nccl", "cuda_ipc"]


@dataclass(frozen=True, slots=True)
class Model:
    """Which model is served, and how."""

    #: a known name, an absolute path of a directory or ``.gguf`` file, or a Hub id
    path: str
    #: what clients call it: the known name, or the last part of the path
    name: str
    #: ``float32``, ``bfloat16`` or ``float16``
    dtype: str
    #: prompt and output tokens together
    max_model_len: int
    #: ``int8``, or None where weights are as ``dtype``
    quantization: str | None = None

    @property
    def weights(self) -> str:
        """What the weights are, in a word or two."""
        return f"{self.dtype}, {self.quantization} weights" if self.quantization else self.dtype


@dataclass(frozen=True, slots=True)
class Slo:
    """The objectives of a request; ``attainment`` is the share of requests that must meet both."""

    ttft_s: float
    tpot_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Node:
    """A host. Others reach it at ``host``; its own sockets bind on ``bind_host``."""

    name: str
    host: str
    bind_host: str
    #: ``cpu:N`` or ``cuda:N``
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Router:
    """The one router: clients at the frontend, workers at the backend."""

    name: str
    node: str
    frontend_bind: str
    frontend_connect: str
    backend_bind: str
    backend_connect: str
    #: requests in the system at once; more are refused as overloaded
    max_requests: int
    #: the longest deadline that a client may ask for
    max_deadline_s: float
    #: a client silent for longer is gone, and its requests are cancelled
    client_lease_s: float
    #: a worker silent for longer is lost, and its requests are retried
    worker_lease_s: float
    #: attempts after the first
    retries: int
    #: how far KV is kept in its node: see :mod:`dssched.dispatch`
    node_affinity: float


@dataclass(frozen=True, slots=True)
class Run:
    """Stages of an instance that follow each other on one node; half-open."""

    node: str
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Instance:
    """One prefill or decode instance: ``tp * pp`` ranks, one device each, stage-major."""

    name: str
    role: Literal["prefill", "decode"]
    #: of the rank that draws, which is the instance to all others
    node: str
    #: one per rank; those of a stage are the same
    nodes: tuple[str, ...]
    #: one per rank, ``cpu:N`` or ``cuda:N`` of the rank's node
    devices: tuple[str, ...]
    #: where the rank hosts of its other nodes join it; None where it has no other nodes
    join_bind: str | None
    join_connect: str | None
    tp: int
    pp: int
    #: tokens in a KV block
    block_size: int
    #: bytes of KV over all ranks; counts only when ``kv_blocks`` is None
    kv_memory_nbytes: int
    kv_blocks: int | None
    #: torch threads of each rank
    threads: int
    #: file under the shared-memory directory that holds the KV pool of a CPU instance
    segment: Path
    #: sequences there, waiting or running, that the router sends
    max_queue: int
    #: sequences of one batch
    max_batch: int
    #: tokens of one batch; for prefill the paper's Lm, for decode where prompts are read too
    max_batch_tokens: int
    #: whether KV is kept for prompts that begin alike
    prefix_cache: bool
    #: decode: prompts are read before anybody's next token
    prefill_priority: bool

    @property
    def hosts(self) -> tuple[RankHost, ...]:
        """Of its ranks on other nodes."""
        others = dict.fromkeys(node for node in self.nodes if node != self.node)
        return tuple(RankHost(f"{self.name}-{node}", node, self.name) for node in others)

    @property
    def stage_nodes(self) -> tuple[str, ...]:
        """The node of each stage."""
        return self.nodes[:: self.tp]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All stages."""
        found: list[Run] = []
        for node, each in groupby(enumerate(self.stage_nodes), key=lambda stage: stage[1]):
            stages = [stage for stage, _ in each]
            found.append(Run(node, stages[0], stages[-1] + 1))
        return tuple(found)

    def run_of(self, rank: int) -> Run:
        """The run that a rank's stage is in."""
        return next(one for one in self.runs if rank // self.tp < one.end)

    def hands_over_to(self, reader: Instance) -> bool:
        """Whether its KV can go there: stages on several nodes hand theirs over within these, and have to make the
        same part of the model there."""
        return not (self.hosts or reader.hosts) or self._parts == reader._parts

    @property
    def _parts(self) -> list[tuple[str, Fraction]]:
        return [(one.node, Fraction(one.end, self.pp)) for one in self.runs]

    def ranks_on(self, node: str) -> tuple[int, ...]:
        """Its ranks on a node."""
        return tuple(rank for rank, one in enumerate(self.nodes) if one == node)


@dataclass(frozen=True, slots=True)
class RankHost:
    """The process that runs the ranks of an instance on a node other than the instance's own."""

    name: str
    node: str
    #: by its name
    instance: str


@dataclass(frozen=True, slots=True)
class Relay:
    """The KV relay of a node."""

    name: str
    node: str
    #: ``ipc://`` endpoint for the instances of the node
    local: str
    #: ``tcp://`` endpoints for other relays; None when no KV ever goes over TCP
    data_bind: str | None
    data_connect: str | None
    #: where decode instances of other nodes read KV; None as above
    stream_bind: Tcp | None
    stream_connect: Tcp | None
    #: of these at once; others take their turn
    streams: int
    #: how long an offered handle waits for its puller
    lease_s: float
    transfer_timeout_s: float
    #: in order of preference
    transports: tuple[Transport, ...]
    #: checksums of all KV
    verify: bool
    #: copies of KV whose readers decode, and room for how much of it
    keep: Path
    keep_nbytes: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """The OpenAI-compatible HTTP front."""

    name: str
    node: str
    #: ``host:port`` without a scheme
    bind: str


@dataclass(frozen=True, slots=True)
class Security:
    """CURVE, decided: ``auto`` has become yes or no."""

    encrypted: bool
    keys_dir: Path


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole system."""

    path: Path
    #: twelve hex digits of content and absolute path: names what belongs to this topology on a host
    digest: str
    run_dir: Path
    shm_dir: Path
    #: ``disaggregated``, ``colocated`` or ``conditional``
    mode: str
    #: in mode ``conditional``, prompts of fewer tokens are read by decode instances
    threshold_tokens: int
    #: use this transport even where a better one could be used
    force_transport: Transport | None
    model: Model
    slo: Slo
    nodes: tuple[Node, ...]
    router: Router
    #: prefill first, then decode
    instances: tuple[Instance, ...]
    #: one per node that has an instance; none in mode ``colocated``, where no KV moves
    relays: tuple[Relay, ...]
    gateway: Gateway | None
    security: Security
    #: prompts that are read in several steps hand over their KV in parts, which end at multiples of so many tokens;
    #: 0: in one piece
    part_tokens: int
    #: whether KV goes from GPU to GPU of the one node that has instances, as far as this file tells
    between_gpus: bool

    def _entries(self) -> Iterator[tuple[str, Role, str]]:
        """Name, role and node of every process, in starting order."""
        for relay in self.relays:
            yield relay.name, "relay", relay.node
        for instance in self.instances:
            yield instance.name, instance.role, instance.node
        for host in self.hosts:
            yield host.name, "rankhost", host.node
        yield self.router.name, "router", self.router.node
        if self.gateway is not None:
            yield self.gateway.name, "gateway", self.gateway.node

    def _entry(self, name: str) -> tuple[str, Role, str]:
        for entry in self._entries():
            if entry[0] == name:
                return entry
        raise self._unknown("process", name, self.process_names())

    def _unknown(self, what: str, name: str, known: tuple[str, ...]) -> TopologyError:
        return TopologyError(
            f"{self.path}: there is no {what} named {name!r}", remedy=f"use one of {', '.join(known)}"
        )

    def process_names(self) -> tuple[str, ...]:
        """Every process, in the order to start them: relays, prefill, decode, router, gateway."""
        return tuple(name for name, _, _ in self._entries())

    def role_of(self, name: str) -> Role:
        """What the process ``name`` is. Raises TopologyError for an unknown name."""
        return self._entry(name)[1]

    def node_of(self, name: str) -> Node:
        """The node that runs the process ``name``. Raises TopologyError for an unknown name."""
        return self.node(self._entry(name)[2])

    def node(self, name: str) -> Node:
        """The node ``name``. Raises TopologyError for an unknown one."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise self._unknown("node", name, tuple(node.name for node in self.nodes))

    def instance(self, name: str) -> Instance:
        """The instance ``name``. Raises TopologyError for an unknown one."""
        for instance in self.instances:
            if instance.name == name:
                return instance
        raise self._unknown("instance", name, tuple(one.name for one in self.instances))

    @property
    def hosts(self) -> tuple[RankHost, ...]:
        """Of all instances whose stages are on several nodes."""
        return tuple(host for instance in self.instances for host in instance.hosts)

    def host(self, name: str) -> RankHost:
        """The rank host ``name``. Raises TopologyError for an unknown one."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise self._unknown("rank host", name, tuple(one.name for one in self.hosts))

    def role(self, role: Role) -> tuple[Instance, ...]:
        """The instances of a role, in order."""
        return tuple(instance for instance in self.instances if instance.role == role)

    def relay(self, name: str) -> Relay:
        """The relay ``name``. Raises TopologyError for an unknown one."""
        for relay in self.relays:
            if relay.name == name:
                return relay
        raise self._unknown("relay", name, tuple(one.name for one in self.relays))

    def relay_of(self, node: str) -> Relay:
        """The relay of the node ``node``. Raises TopologyError when the node has none."""
        for relay in self.relays:
            if relay.node == node:
                return relay
        raise self._unknown("relay on a node", node, tuple(one.node for one in self.relays))

    def transport(self, owner_node: str, puller_node: str) -> Transport:
        """How KV goes from ``owner_node`` to ``puller_node``.

        Shared memory on one node, or CUDA IPC between GPUs, unless another way is forced or that is not among its
        relay's transports.
        """
        if self.between_gpus:
            return "cuda_ipc"
        if self.force_transport is not None:
            return self.force_transport
        same = owner_node == puller_node
        return "shm" if same and "shm" in self.relay_of(owner_node).transports else "tcp"

    def handoffs(self) -> Iterator[tuple[Instance, Instance]]:
        """Every prefill instance with each decode instance that can be handed its KV."""
        for owner in self.role("prefill"):
            for reader in self.role("decode"):
                if owner.hands_over_to(reader):
                    yield owner, reader

    @property
    def reach(self) -> dict[str, frozenset[str]]:
        """Of each prefill instance the decode instances that can be handed its KV; empty where all of them can."""
        if not self.hosts:
            return {}
        found = {one.name: frozenset[str]() for one in self.role("prefill")}
        for owner, reader in self.handoffs():
            found[owner.name] |= {reader.name}
        return found

    def roles_on(self, node: str) -> set[Role]:
        """Of the instances on a node."""
        return {instance.role for instance in self.instances if instance.node == node}

    def sources_of(self, node: str) -> tuple[str, ...]:
        """Nodes whose KV comes to ``node`` by the network: those of owners, where this one has a reader."""
        owners = dict.fromkeys(owner.node for owner, reader in self.handoffs() if reader.node == node)
        reachable = (relay.node for relay in self.relays if relay.data_connect is not None)
        return tuple(other for other in reachable if other in owners and self.transport(other, node) not in LOCAL)

    @property
    def collective(self) -> str:
        """By whose communicators KV goes, "gloo" or "nccl"; "" where it goes by none."""
        forced = self.force_transport
        return forced if forced in ("gloo", "nccl") else ""
