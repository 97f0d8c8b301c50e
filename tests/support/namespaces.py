"""Two hosts made of network namespaces, each of which believes to reach the other; a test carries every byte.

Host ``a`` has the address ``A`` and host ``b`` the address ``B``. The far end of each host's only cable lies in a
namespace that has the *other* host's address: what listens there is a :class:`~support.longwire.LongWire` of the
test, which calls the real listener from inside its own host.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

A = "10.177.0.1"
B = "10.177.0.2"
_CLONE_NEWNET = 0x40000000
#: where iproute2 keeps the namespaces that it has named
_NAMED = Path("/run/netns")


@dataclass(frozen=True, slots=True)
class Hosts:
    """Names of the namespaces."""

    a: str
    b: str
    #: has ``B``, seen from ``a``
    far_a: str
    #: has ``A``, seen from ``b``
    far_b: str


def possible() -> bool:
    """Whether this process may make namespaces and cables between them."""
    if shutil.which("ip") is None:
        return False
    try:
        with two_hosts():
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts, no wire yet. Raises :class:`subprocess.CalledProcessError` where that is not allowed."""
    tag = uuid.uuid4().hex[:6]
    hosts = Hosts(*(f"ds-{tag}-{which}" for which in ("a", "b", "fa", "fb")))
    try:
        for name in (hosts.a, hosts.b, hosts.far_a, hosts.far_b):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _cable(hosts.a, A, hosts.far_a, B)
        _cable(hosts.b, B, hosts.far_b, A)
        yield hosts
    finally:
        for name in (hosts.a, hosts.b, hosts.far_a, hosts.far_b):
            if (_NAMED / name).exists():
                _ip("netns", "del", name)


def _cable(near: str, near_address: str, far: str, far_address: str) -> None:
    _ip("-n", near, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far)
    for name, address in ((near, near_address), (far, far_address)):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def socket_in(namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
    """What ``make`` makes inside a namespace; a socket stays in the one that it was made in."""

    def enter_and_make() -> socket.socket:
        descriptor = os.open(_NAMED / namespace, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        finally:
            os.close(descriptor)
        return make()

    # a thread has a namespace of its own, and this one ends with its work
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(enter_and_make).result()
