"""What a process of a topology opens and shows: its sockets, the keys that guard them, the model it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsengine.snapshot import identity
from dstopology.resolved import Topology
from dswire.actor import Route
from dswire.errors import Unauthorized
from dswire.keys import CurveKeys, load_system
from dswire.links import RELAY, ROUTER
from dswire.messages import kv, worker
from dswire.sockets import ConnectedSocket


def system_keys(topology: Topology) -> CurveKeys | None:
    """The system's keys; None where the topology is not encrypted. Raises :class:`BadInput`."""
    return load_system(topology.security.keys_dir) if topology.security.encrypted else None


def router_route(topology: Topology, name: str, incarnation: str) -> Route:
    """A worker's connection to the router. The identity tells two processes of one name apart."""
    return _connected(topology, topology.router.backend_connect, f"{name}/{incarnation}", worker.ToWorker, ROUTER)


def relay_route(topology: Topology, name: str) -> Route:
    """An instance's connection to the relay of its node."""
    endpoint = topology.relay_of(topology.instance(name).node).local
    return _connected(topology, endpoint, name, kv.ToKvWorker, RELAY)


def _connected(topology: Topology, endpoint: str, identity: str, union: Any, peer: str) -> Route:
    """A connection within the system; to be turned away there ends the process, since no waiting helps."""

    def on_denied(error: Unauthorized) -> None:
        remedy = "start every process from the same topology, with the same keys"
        route.denied(Unauthorized(error.message, remedy=remedy))

    socket = ConnectedSocket(endpoint, identity, keys=system_keys(topology), on_denied=on_denied)
    route = Route(socket, union, peer=peer)
    return route


def model_identity(topology: Topology, model_dir: Path) -> worker.ModelIdentity:
    """What router and workers must agree on. Reads a few blocks of the files in ``model_dir``."""
    model = topology.model
    return worker.ModelIdentity(model.name, identity(model_dir).fingerprint, model.dtype, model.quantization)
