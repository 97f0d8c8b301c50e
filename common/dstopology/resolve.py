"""Turns a checked file into a resolved topology: defaults, places, addresses, and whether it all fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import cast

from dstopology import fit, gpus, modelfacts, sides
from dstopology.modelfacts import ModelFacts
from dstopology.network import Ends, Network, same_machine
from dstopology.placement import Placed, WorkerRole, place, resolve_nodes
from dstopology.problems import Key, Problems
from dstopology.resolved import (
    LOCAL,
    Gateway,
    Instance,
    Model,
    Node,
    Relay,
    Router,
    Security,
    Slo,
    Topology,
    Transport,
)
from dstopology.schema import (
    DecodeSection,
    File,
    GatewaySection,
    GroupSection,
    KvSection,
    ModelSection,
    PrefillSection,
    RouterSection,
    SecuritySection,
    nbytes,
)

BLOCK_SIZE = 16
KV_MEMORY_NBYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Resolver:
    """One run of :func:`dstopology.load.load`."""

    file: File
    path: Path
    digest: str
    run_dir: Path
    shm_dir: Path
    #: where keys are unless the file says otherwise
    keys_dir: Path
    #: reads the facts of the model at a path
    facts: Callable[[str], ModelFacts | None]
    problems: Problems

    def topology(self) -> Topology:
        """The resolved topology. Raises :class:`TopologyError` with all problems."""
        groups = self._groups()
        ranks = sum((group.replicas or 1) * group.tp * group.pp for group in groups.values())
        nodes = resolve_nodes(self.file.nodes, ranks, self.problems)
        placed = place(groups, nodes, self.problems)
        network = Network(nodes, self.run_dir, self.problems)
        instances = tuple(self._instance(one, groups[one.role], nodes, placed) for one in placed)
        router = self._router(network, nodes)
        instances = self._joined(network, nodes, instances)
        relays = self._relays(network, nodes, instances)
        gateway = self._gateway(network, network.node(router.node, ("router", "node"), nodes[0]))
        network.check_collisions()
        model = self._model(groups, nodes, instances, relays)
        security = self._security(network)
        part_tokens = self._part_tokens(instances, relays)
        between_gpus = self._between_gpus(instances, relays)
        self.problems.raise_any()
        return Topology(
            path=self.path,
            digest=self.digest,
            run_dir=self.run_dir,
            shm_dir=self.shm_dir,
            mode=self.file.mode,
            threshold_tokens=self.file.conditional.threshold_tokens,
            force_transport=cast("Transport | None", self.file.force_transport),
            model=model,
            slo=self._slo(),
            nodes=nodes,
            router=router,
            instances=instances,
            relays=relays,
            gateway=gateway,
            security=security,
            part_tokens=part_tokens,
            between_gpus=between_gpus,
        )

    def _slo(self) -> Slo:
        slo = self.file.slo
        return Slo(slo.ttft_ms / 1000, slo.tpot_ms / 1000, slo.attainment)

    # instances

    def _groups(self) -> dict[WorkerRole, PrefillSection | DecodeSection]:
        """The sections of the roles that there are, with the number of replicas where places tell it."""
        prefill, decode = self.file.prefill, self.file.decode
        sections: dict[WorkerRole, PrefillSection | DecodeSection] = {
            "prefill": PrefillSection(replicas=prefill) if isinstance(prefill, int) else prefill,
            "decode": DecodeSection(replicas=decode) if isinstance(decode, int) else decode,
        }
        if self.file.mode == "colocated" and sections.pop("prefill") != PrefillSection():
            reason = "in mode colocated the decode instances read the prompts, there are no others"
            self.problems.add(("prefill",), reason, "remove the key, and have more decode.replicas instead")
        self._check_kv(sections)
        return {
            role: replace(group, replicas=len(group.place)) if group.place and not group.replicas else group
            for role, group in sections.items()
        }

    def _check_kv(self, groups: Mapping[WorkerRole, GroupSection]) -> None:
        sections: list[tuple[Key, KvSection | None]] = [(("kv",), self.file.kv)]
        sections += [((role, "kv"), group.kv) for role, group in groups.items()]
        for at, kv in sections:
            if kv is not None and kv.memory is not None and kv.blocks is not None:
                self.problems.add(at, "memory and blocks are both given", "keep one of the two")

    def _block_size(self, group: GroupSection) -> int:
        own = group.kv.block_size if group.kv is not None else None
        return own or self.file.kv.block_size or BLOCK_SIZE

    def _prefix_cache(self, group: GroupSection) -> bool:
        own = group.kv.prefix_cache if group.kv is not None else None
        return next((one for one in (own, self.file.kv.prefix_cache) if one is not None), True)

    def _pool(self, group: GroupSection) -> tuple[int, int | None]:
        """Bytes and blocks of a pool; the blocks count when they are not None."""
        own = group.kv
        kv = own if own is not None and (own.memory or own.blocks) else self.file.kv
        return nbytes(kv.memory) if kv.memory is not None else KV_MEMORY_NBYTES, kv.blocks

    def _instance(
        self,
        placed: Placed,
        group: PrefillSection | DecodeSection,
        nodes: Sequence[Node],
        everyone: Sequence[Placed],
    ) -> Instance:
        memory_nbytes, blocks = self._pool(group)
        return Instance(
            name=placed.name,
            role=placed.role,
            node=placed.node,
            nodes=placed.nodes,
            devices=placed.devices,
            join_bind=None,
            join_connect=None,
            tp=group.tp,
            pp=group.pp,
            block_size=self._block_size(group),
            kv_memory_nbytes=memory_nbytes,
            kv_blocks=blocks,
            threads=group.threads or _threads(placed, nodes, everyone),
            segment=self.shm_dir / f"ds-{self.digest}-{placed.name}.kv",
            max_queue=group.max_queue,
            max_batch=group.max_batch,
            max_batch_tokens=group.max_batch_tokens,
            prefix_cache=self._prefix_cache(group),
            prefill_priority=isinstance(group, DecodeSection) and group.prefill_priority,
        )

    def _joined(
        self, network: Network, nodes: Sequence[Node], instances: Sequence[Instance]
    ) -> tuple[Instance, ...]:
        """The same, with addresses where rank hosts of other nodes join; tells of such that cannot be."""
        spread = [one for one in instances if one.hosts]
        if spread and self.file.mode != "colocated":
            sides.check_settings(self.file, spread[0], self.problems)
            sides.check_partners(instances, self.problems)
        joined: dict[str, Instance] = {}
        for port, one in enumerate(spread, self.file.ranks.port):
            node = next(node for node in nodes if node.name == one.node)
            ends = network.ranks(one.name, node, port, ("ranks", "port"))
            joined[one.name] = replace(one, join_bind=ends.bind, join_connect=ends.connect)
        return tuple(joined.get(one.name, one) for one in instances)

    # router, relays, gateway

    def _router(self, network: Network, nodes: Sequence[Node]) -> Router:
        written = self.file.router
        section = RouterSection(frontend=written) if isinstance(written, str) else written
        node = network.node(section.node, ("router", "node"), nodes[0])
        at: Key = ("router",) if isinstance(written, str) else ("router", "frontend")
        frontend = network.frontend(section, at, node)
        backend = self._backend(network, section, node, at)
        return Router(
            name="router-0",
            node=node.name,
            frontend_bind=frontend.bind,
            frontend_connect=frontend.connect,
            backend_bind=backend.bind,
            backend_connect=backend.connect,
            max_requests=section.max_requests,
            max_deadline_s=section.max_deadline_s,
            client_lease_s=section.client_lease_s,
            worker_lease_s=section.worker_lease_s,
            retries=section.retries,
            node_affinity=section.node_affinity,
        )

    def _backend(self, network: Network, section: RouterSection, node: Node, frontend: Key) -> Ends:
        at: Key = ("router", "backend") if section.backend else frontend
        ends = network.backend(section, at, node)
        if ends.bind.startswith("ipc://") and network.several_nodes:
            reason = "workers of other nodes cannot reach a socket file"
            self.problems.add(at, reason, "give a tcp:// address, or leave the key out")
        return ends

    def _gateway(self, network: Network, default: Node) -> Gateway | None:
        section = self.file.gateway
        if section is None:
            return None
        if isinstance(section, str):
            return network.gateway(GatewaySection(bind=section), ("gateway",), default)
        node = network.node(section.node, ("gateway", "node"), default)
        return network.gateway(section, ("gateway", "bind"), node)

    def _relays(self, network: Network, nodes: Sequence[Node], instances: Sequence[Instance]) -> tuple[Relay, ...]:
        """One relay for each node that has an instance, where KV moves at all."""
        if self.file.mode == "colocated":
            return ()
        used = {instance.node for instance in instances}
        owners = {instance.node for instance in instances if instance.role == "prefill"}
        over_tcp = self._check_transports(instances)
        found: list[Relay] = []
        for node in (one for one in nodes if one.name in used):
            port = self.file.relay.port + 2 * len(found) if over_tcp else None
            found.append(self._relay(network, node, port, keeps=node.name in owners))
        return tuple(found)

    def _relay(self, network: Network, node: Node, port: int | None, *, keeps: bool) -> Relay:
        """``port``: the first of two, where KV goes by TCP."""
        section, at = self.file.relay, ("relay", "port")
        data = network.relay_data(node, port, at) if port is not None else None
        stream = network.relay_stream(node, port + 1, at) if port is not None else (None, None)
        name = f"relay-{node.name}"
        return Relay(
            name=name,
            node=node.name,
            local=network.socket(f"{name}.sock", ("nodes",)),
            data_bind=data.bind if data else None,
            data_connect=data.connect if data else None,
            stream_bind=stream[0],
            stream_connect=stream[1],
            streams=section.streams,
            lease_s=section.lease_s,
            transfer_timeout_s=section.transfer_timeout_s,
            transports=cast("tuple[Transport, ...]", section.transports),
            verify=section.verify,
            keep=self.shm_dir / f"ds-{self.digest}-{name}.keep",
            keep_nbytes=nbytes(section.keep) if section.keep is not None and keeps else 0,
        )

    def _part_tokens(self, instances: Sequence[Instance], relays: Sequence[Relay]) -> int:
        """Tokens whose KV is whole blocks on either side, and can be a part; 0 where KV goes in one piece."""
        overlap, at = self.file.relay.overlap, ("relay", "overlap")
        crosses = any(one.data_bind is not None for one in relays)
        keeps = any(one.keep_nbytes for one in relays)
        if overlap == "on" and keeps:
            self.problems.add(at, "KV that goes in parts cannot be kept", "leave out relay.keep or relay.overlap")
        if overlap == "off" or keeps or not (crosses or (relays and overlap == "on")):
            return 0
        return lcm(*(one.block_size for one in instances))

    def _check_transports(self, instances: Sequence[Instance]) -> bool:
        """Whether any KV goes over TCP; tells of transports that cannot do what is needed."""
        allowed, forced = self.file.relay.transports, self.file.force_transport
        if forced is not None and forced not in allowed:
            reason = f"{forced} is not among relay.transports, which are {', '.join(allowed)}"
            self.problems.add(("force_transport",), reason, f"add {forced} there, or force another")
        crossing = sorted({f"{a.node} to {b.node}" for a, b in sides.pairs(instances) if a.node != b.node})
        if crossing and forced == "shm":
            reason = f"KV goes from node {crossing[0]}, where shm cannot reach"
            self.problems.add(("force_transport",), reason, "leave the key out, or use one node")
        elif crossing and forced is None and "tcp" not in allowed:
            reason = f"KV goes from node {crossing[0]}, and tcp is not among the transports"
            self.problems.add(("relay", "transports"), reason, "add tcp, or use one node")
        self._check_communicators(instances)
        return bool(crossing) or forced not in (None, *LOCAL) or "shm" not in allowed

    def _between_gpus(self, instances: Sequence[Instance], relays: Sequence[Relay]) -> bool:
        """Whether KV goes by CUDA IPC; tells why it cannot where it has to."""
        allowed, forced = self.file.relay.transports, self.file.force_transport
        if not relays or forced not in (None, "cuda_ipc") or "cuda_ipc" not in allowed:
            return False
        found = gpus.obstacle(instances, relays)
        if found is not None and forced is not None:
            reason, remedy = found
            self.problems.add(("force_transport",), f"cuda_ipc goes between GPUs of one host: {reason}", remedy)
        return found is None

    def _check_communicators(self, instances: Sequence[Instance]) -> None:
        """Tell of instances that cannot send by gloo, which is for CPUs, or nccl, which is for GPUs."""
        forced = self.file.force_transport
        if forced not in ("gloo", "nccl"):
            return
        kind = "cpu" if forced == "gloo" else "cuda"
        for one in instances:
            if not all(device.startswith(kind) for device in one.devices):
                reason = f"{forced} is for instances on {kind}, and {one.name} is on {one.devices[0]}"
                self.problems.add(("force_transport",), reason, f"place it on {kind}:N, or leave the key out")

    # model, security

    def _model(
        self,
        groups: Mapping[WorkerRole, GroupSection],
        nodes: Sequence[Node],
        instances: Sequence[Instance],
        relays: Sequence[Relay],
    ) -> Model:
        """The model, once its shape, its sequences and its bytes are known to fit."""
        written = self.file.model
        section = ModelSection(path=written) if isinstance(written, str) else written
        path = modelfacts.written_path(section.path, self.path)
        facts = self.facts(path)
        on_gpu = any(device.startswith("cuda") for one in instances for device in one.devices)
        dtype = section.dtype or ("bfloat16" if on_gpu else "float32")
        quantization = None if section.quantization == "none" else section.quantization
        if quantization and on_gpu:
            self.problems.add(
                ("model", "quantization"), f"{quantization} weights are for CPU devices", "leave it out"
            )
        if facts is not None:
            if quantization and facts.foreign:
                reason = f"{facts.architecture} runs through transformers' modules, which have no such weights"
                self.problems.add(("model", "quantization"), reason, "leave it out")
            fit.check_shape(facts, groups, self.problems)
            if relays:
                sides.check_layers(facts, instances, self.problems)
            fit.check_memory(facts, dtype, quantization, nodes, instances, relays, self.shm_dir, self.problems)
            for relay in [one for one in relays if one.keep_nbytes][:1]:
                fit.check_keep(facts, relay, self._block_size(groups["prefill"]), dtype, self.problems)
        length = fit.model_len(section.max_model_len, facts, instances, dtype, self.problems)
        return Model(path, modelfacts.model_name(path), dtype, length, quantization)

    def _security(self, network: Network) -> Security:
        written = self.file.security
        section = SecuritySection(curve=written) if isinstance(written, str) else written
        keys_dir = self.keys_dir
        if section.keys is not None:
            keys_dir = (self.path.parent / Path(section.keys).expanduser()).absolute()
        encrypted = section.curve == "on" or (section.curve == "auto" and network.exposed)
        if encrypted and self.file.force_transport in ("gloo", "nccl"):
            reason = f"{self.file.force_transport} encrypts nothing, and this system is encrypted"
            remedy = "leave the key out, or say `security: off` where nobody else is on the network"
            self.problems.add(("force_transport",), reason, remedy)
        return Security(encrypted, keys_dir)


def _threads(placed: Placed, nodes: Sequence[Node], everyone: Sequence[Placed]) -> int:
    """This host's cores, shared evenly by the ranks on the fullest machine of an instance."""
    most = 0
    for here in (one for one in nodes if one.name in placed.nodes):
        machine = {one.name for one in nodes if same_machine((one, here))}
        most = max(most, sum(node in machine for other in everyone for node in other.nodes))
    return max(1, len(os.sched_getaffinity(0)) // most)
