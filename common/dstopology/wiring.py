"""What a process of a topology opens and shows: its sockets, the keys that guard them, the model it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsengine.snapshot import identity
from dstopology.resolved import RankHost, Topology
from dswire.actor import Route
from dswire.errors import Unauthorized
from dswire.keys import CurveKeys, load_system
from dswire.links import RELAY, ROUTER
from dswire.messages import kv, ranks, worker
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


def host_route(topology: Topology, host: RankHost, incarnation: str, peer: str) -> Route:
    """A rank host's connection to its instance, which tells when it comes and goes."""
    endpoint = topology.instance(host.instance).join_connect
    assert endpoint is not None
    return _connected(topology, endpoint, f"{host.name}/{incarnation}", ranks.ToHost, peer)


def _connected(topology: Topology, endpoint: str, identity: str, union: Any, peer: str) -> Route:
    """A connection within the system; to be turned away there ends the process, since no waiting helps."""

    def on_denied(error: Unauthorized) -> None:
        remedy = "start every process from the same topology, with the same keys"
        route.denied(Unauthorized(error.message, remedy=remedy))

    def on_link(there: bool) -> None:
        route.linked(there)

    keys = system_keys(topology)
    socket = ConnectedSocket(endpoint, identity, keys=keys, on_denied=on_denied, on_link=on_link)
    route = Route(socket, union, peer=peer)
    return route


def model_identity(topology: Topology, model_dir: Path) -> worker.ModelIdentity:
    """What router and workers must agree on. Reads a few blocks of the files in ``model_dir``."""
    model = topology.model
    return worker.ModelIdentity(model.name, identity(model_dir).fingerprint, model.dtype, model.quantization)
