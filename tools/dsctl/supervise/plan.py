"""What one host runs of a topology: which nodes are this host, which processes they have, and their commands."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from dstopology.endpoints import is_local
from dstopology.resolved import Node, Topology
from dswire.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Spec:
    """One process to run."""

    name: str
    role: str
    node: str
    devices: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the supervisor of this host runs, in starting order."""

    topology: Topology
    nodes: tuple[str, ...]
    specs: tuple[Spec, ...]


def make_plan(topology: Topology, node: str | None) -> Plan:
    """The plan for ``node``, or for every node of the topology that is this host.

    Raises :class:`TopologyError` for an unknown node, and when no node is this host.
    """
    nodes = (topology.node(node),) if node else tuple(one for one in topology.nodes if is_here(one))
    if not nodes:
        hosts = ", ".join(f"{one.name} ({one.host})" for one in topology.nodes)
        raise TopologyError(
            f"{topology.path}: none of its nodes is this host: {hosts}", remedy="say which one it is with --node"
        )
    names = tuple(one.name for one in nodes)
    specs = tuple(
        _spec(topology, name) for name in topology.process_names() if topology.node_of(name).name in names
    )
    return Plan(topology, names, specs)


def _spec(topology: Topology, name: str) -> Spec:
    role = topology.role_of(name)
    node = topology.node_of(name).name
    devices = _devices(topology, name, role, node)
    command = (sys.executable, "-m", f"ds{role}", "--topology", str(topology.path), "--name", name)
    return Spec(name, role, node, devices, command)


def _devices(topology: Topology, name: str, role: str, node: str) -> tuple[str, ...]:
    """Those of a process's own node."""
    if role not in ("prefill", "decode", "rankhost"):
        return ()
    instance = topology.instance(topology.host(name).instance if role == "rankhost" else name)
    return tuple(instance.devices[rank] for rank in instance.ranks_on(node))


def is_here(node: Node) -> bool:
    """Whether the node's host is this one: only an address of our own can be bound."""
    if is_local(node.host):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(node.host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def ipc_paths(plan: Plan) -> list[Path]:
    """The Unix sockets that the plan's processes bind."""
    topology = plan.topology
    endpoints = [relay.local for relay in topology.relays if relay.node in plan.nodes]
    if topology.router.node in plan.nodes:
        endpoints += [topology.router.frontend_bind, topology.router.backend_bind]
    return [Path(endpoint.removeprefix("ipc://")) for endpoint in endpoints if endpoint.startswith("ipc://")]
