"""Which process listens where, and how others reach it. No two sockets of a host collide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstopology.endpoints import (
    MAX_SOCKET_PATH_NBYTES,
    Tcp,
    bindable,
    is_any,
    is_local,
    is_loopback,
    split,
)
from dstopology.problems import Key, Problems, did_you_mean
from dstopology.resolved import Gateway, Node
from dstopology.schema import GatewaySection, RouterSection

FRONTEND = "the router's frontend"
#: where the frontend is no TCP port that it could follow
BACKEND_PORT = 5556
ROUTER_BACKEND_FILE = "router-backend.sock"


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of an address."""

    bind: str
    connect: str


@dataclass(frozen=True, slots=True)
class _Listener:
    """A TCP socket that somebody binds."""

    key: Key
    what: str
    node: Node
    address: Tcp


class Network:
    """Hands out addresses, and remembers them to find collisions."""

    def __init__(self, nodes: Sequence[Node], run_dir: Path, problems: Problems) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._run_dir = run_dir
        self._problems = problems
        self._listeners: list[_Listener] = []

    @property
    def exposed(self) -> bool:
        """Whether any socket can be reached from another host."""
        return any(not is_loopback(listener.address.host) for listener in self._listeners)

    @property
    def several_nodes(self) -> bool:
        """Whether there is more than one node."""
        return len(self._nodes) > 1

    def node(self, name: str | None, at: Key, default: Node) -> Node:
        """The node that a section names."""
        if name is None or name in self._nodes:
            return self._nodes[name] if name else default
        self._problems.add(at, f"there is no node {name!r}", did_you_mean(name, self._nodes))
        return default

    def frontend(self, section: RouterSection, at: Key, node: Node) -> Ends:
        """Where clients reach the router."""
        return self._written(section.frontend, at, node, FRONTEND)

    def backend(self, section: RouterSection, at: Key, node: Node) -> Ends:
        """Where workers reach the router."""
        if section.backend is not None:
            return self._written(section.backend, at, node, "the router's backend")
        if not self.several_nodes:
            path = self.socket(ROUTER_BACKEND_FILE, at)
            return Ends(path, path)
        # a frontend that is wrong was told of already
        port = next((one.address.port + 1 for one in self._listeners if one.what == FRONTEND), BACKEND_PORT)
        return self._tcp(at, "the router's backend", node, Tcp(node.bind_host, port), node.host)

    def relay_data(self, node: Node, port: int, at: Key) -> Ends:
        """Where other relays reach the relay of ``node``."""
        return self._tcp(at, f"the relay of {node.name}", node, Tcp(node.bind_host, port), node.host)

    def relay_stream(self, node: Node, port: int, at: Key) -> tuple[Tcp, Tcp]:
        """Where KV is read from the relay of ``node``: bound, and reached by others."""
        self._tcp(at, f"the streams of {node.name}", node, Tcp(node.bind_host, port), node.host)
        return Tcp(node.bind_host, port), Tcp(node.host, port)

    def ranks(self, instance: str, node: Node, port: int, at: Key) -> Ends:
        """Where rank hosts join an instance whose drawing rank is on ``node``."""
        return self._tcp(at, f"{instance}, for its rank hosts,", node, Tcp(node.bind_host, port), node.host)

    def gateway(self, section: GatewaySection, at: Key, node: Node) -> Gateway:
        """The gateway's address."""
        ends = self._written(f"tcp://{section.bind}", at, node, "the gateway")
        return Gateway("gateway-0", node.name, ends.bind.removeprefix("tcp://"))

    def socket(self, file: str, at: Key) -> str:
        """``ipc://`` address of a file in the run directory."""
        return self._ipc(f"ipc://{self._run_dir / file}", at)

    def _written(self, address: str, at: Key, node: Node, what: str) -> Ends:
        """Ends of an address that the file gives."""
        if address.startswith("ipc://"):
            path = self._ipc(address, at)
            return Ends(path, path)
        host = address.removeprefix("tcp://").rpartition(":")[0]
        try:
            port = split(address).port
        except ValueError as error:
            self._problems.add(at, str(error), "write a port from 1 to 65535")
            return Ends(address, address)
        bound = Tcp(bindable(host, node.bind_host), port)
        return self._tcp(at, what, node, bound, node.host if is_any(host) else host)

    def _tcp(self, at: Key, what: str, node: Node, bound: Tcp, connect_host: str) -> Ends:
        if bound.port > 65_535:
            self._problems.add(at, f"{what} would get port {bound.port}", "choose a lower port")
        self._listeners.append(_Listener(at, what, node, bound))
        return Ends(str(bound), str(Tcp(connect_host, bound.port)))

    def _ipc(self, address: str, at: Key) -> str:
        path = address.removeprefix("ipc://")
        length = len(path.encode())
        if length > MAX_SOCKET_PATH_NBYTES:
            reason = f"the socket path {path} has {length} bytes, more than {MAX_SOCKET_PATH_NBYTES}"
            self._problems.add(at, reason, "set DS_RUN_DIR to a shorter directory")
        return address

    def check_collisions(self) -> None:
        """Tell of sockets that want the same port of the same host."""
        for index, later in enumerate(self._listeners):
            for earlier in self._listeners[:index]:
                same_host = same_machine((earlier.node, later.node))
                if same_host and earlier.address.collides(later.address):
                    reason = f"{later.what} would listen at {later.address}, as does {earlier.what}"
                    self._problems.add(later.key, reason, "give one of them another port")


def same_machine(nodes: Iterable[Node]) -> bool:
    """Whether all ``nodes`` are names for one machine, as far as their addresses tell."""
    found = list(nodes)
    return len({node.host for node in found}) == 1 or all(is_local(node.host) for node in found)
