"""Addresses: where a socket binds, where others connect to it, and whether two sockets collide."""

from __future__ import annotations

import ipaddress
import random
import socket
from dataclasses import dataclass

#: Linux: ``sun_path`` has 108 bytes with its final zero
MAX_SOCKET_PATH_NBYTES = 107
_ANY = ("*", "0.0.0.0")
#: where :func:`free_ports` looks; Linux takes ports for connections from 32768 on, others from 49152 on
_LOWEST_FREE = 10_240
_LOWEST_OF_CONNECTIONS = 32_768


def is_ip(host: str) -> bool:
    """Whether ``host`` is a literal IPv4 address."""
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def is_any(host: str) -> bool:
    """Whether ``host`` stands for all addresses of a host."""
    return host in _ANY


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from the same host only."""
    return host == "localhost" or (is_ip(host) and ipaddress.IPv4Address(host).is_loopback)


def is_local(host: str) -> bool:
    """Whether ``host`` is the host that this program runs on, as far as can be told without asking the network."""
    return is_loopback(host) or is_any(host) or host == socket.gethostname()


def bindable(host: str, fallback: str) -> str:
    """The address to bind for ``host``: itself when literal, ``fallback`` for a DNS name."""
    if host == "localhost":
        return "127.0.0.1"
    if is_any(host):
        return "0.0.0.0"
    return host if is_ip(host) else fallback


@dataclass(frozen=True, slots=True)
class Tcp:
    """``host:port`` of a TCP socket."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def pair(self) -> tuple[str, int]:
        """As the socket module wants it."""
        return self.host, self.port

    def collides(self, other: Tcp) -> bool:
        """Whether both cannot be bound on one host."""
        return self.port == other.port and (self.host == other.host or is_any(self.host) or is_any(other.host))


def split(address: str) -> Tcp:
    """``tcp://host:port`` or ``host:port``. Raises ValueError with the reason when the port is none."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not 1 <= int(port) <= 65_535:
        raise ValueError(f"port {port} is out of range")
    return Tcp(host, int(port))


def free_ports(count: int = 1) -> int:
    """The first of ``count`` adjacent TCP ports of this host that nobody listens on.

    They lie below those from which kernels take the ports of connections, so no connection takes one meanwhile.
    """
    while True:
        first = random.randrange(_LOWEST_FREE, _LOWEST_OF_CONNECTIONS - count)
        if all(_is_free(first + at) for at in range(count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # as libzmq binds: a port whose connections have just ended is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
