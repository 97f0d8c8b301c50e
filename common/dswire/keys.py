"""CURVE keys: who we are, and whom we let in.

A system has one directory of keys (``dsctl keys make``)::

    system.key      the secret key every process of the system serves and calls with; mode 0600
    system.pub      its public half: what a client needs to know the router by
    allowed/*.pub   public keys of clients that may connect, one file each

A client has a directory of its own (``dsctl keys make --client NAME``): ``client.key``, ``client.pub``, and a copy
of ``system.pub``.

Servers accept the system's own key and the keys in ``allowed/``; anything else is turned away by libzmq before a
byte of ours is read. A key file holds one Z85 key of 40 characters.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from dswire.errors import BadInput, DsError

#: of a key as text
KEY_NCHARS = 40
SYSTEM_SECRET = "system.key"
SYSTEM_PUBLIC = "system.pub"
ALLOWED = "allowed"
CLIENT_SECRET = "client.key"
CLIENT_PUBLIC = "client.pub"
#: ZAP domain of every server socket
DOMAIN = "distserve"


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """One process's identity, and the server's when it calls one."""

    public: bytes
    secret: bytes
    #: public key of the servers we call; our own within a system
    server: bytes

    def guard_server(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket serve with CURVE. :func:`start_authenticator` decides who may come in."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)

    def guard_client(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket call with CURVE."""
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)


def read_key(path: Path) -> bytes:
    """The key in a file. Raises :class:`BadInput` when it cannot be read or is none."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError as error:
        raise BadInput(
            f"{path}: the key cannot be read: {error.strerror}", remedy="make the keys with `dsctl keys make`"
        ) from error
    return check_key(text, str(path))


def check_key(text: str, where: str, remedy: str = "make the keys anew with `dsctl keys make`") -> bytes:
    """``text`` as a key. Raises :class:`BadInput` with ``remedy`` when it is none."""
    try:
        valid = len(text) == KEY_NCHARS and len(z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):
        valid = False
    if not valid:
        raise BadInput(f"{where}: is no Z85 key of 40 characters", remedy=remedy)
    return text.encode()


def load_system(directory: Path) -> CurveKeys:
    """The system's own keys. Raises :class:`BadInput` when they are missing: a restart would not help."""
    secret = read_key(directory / SYSTEM_SECRET)
    public = zmq.curve_public(secret)
    return CurveKeys(public, secret, public)


def load_client(secret_file: Path, server_file: Path) -> CurveKeys:
    """A client's keys: its own secret, and the system's public key."""
    secret = read_key(secret_file)
    return CurveKeys(zmq.curve_public(secret), secret, read_key(server_file))


def load_any(directory: Path) -> CurveKeys:
    """What a client calls with: ``client.key`` and ``system.pub`` where there are such, else the system's keys."""
    if (directory / CLIENT_SECRET).exists():
        return load_client(directory / CLIENT_SECRET, directory / SYSTEM_PUBLIC)
    return load_system(directory)


def write_pair(secret_file: Path, public_file: Path) -> bytes:
    """Make a fresh pair; returns the public key. Raises :class:`BadInput` rather than overwrite."""
    for path in (secret_file, public_file):
        if path.exists():
            raise BadInput(f"{path}: exists already", remedy="remove it first if it is really to be replaced")
    public, secret = zmq.curve_keypair()
    secret_file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret + b"\n")
    public_file.parent.mkdir(parents=True, exist_ok=True)
    public_file.write_bytes(public + b"\n")
    return public


def allow(directory: Path, name: str, public: bytes) -> None:
    """Put a client's public key on the allow-list. Raises :class:`BadInput` rather than replace another key."""
    path = directory / ALLOWED / f"{name}.pub"
    if path.exists() and read_key(path) != public:
        raise BadInput(f"{path}: holds another key", remedy="take another name, or revoke the old key first")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(public + b"\n")


def allowed(directory: Path) -> dict[str, bytes]:
    """Name and public key of every client on the allow-list, by name. Raises like :func:`read_key`."""
    return {path.stem: read_key(path) for path in sorted((directory / ALLOWED).glob("*.pub"))}


def start_authenticator(directory: Path, *, clients: bool = True) -> ThreadAuthenticator:
    """Begin to turn away every key but the system's own and those of ``clients``; stop it with ``stop()``.

    The list is read anew for each connection that knocks, so a change to it needs no restart. To be called before
    the sockets that it guards are bound: nobody is asked about who knocks earlier.
    """
    guard = _AllowList(directory / ALLOWED if clients else None, load_system(directory).public)
    allowed(directory)
    authenticator = ThreadAuthenticator(zmq.Context.instance())
    # first: from the start on, those who knock are judged by it, and by nothing it turns away everyone
    authenticator.configure_curve_callback(DOMAIN, guard)
    authenticator.start()
    return authenticator


class _AllowList:
    """Asked by the authenticator's thread."""

    def __init__(self, directory: Path | None, system: bytes) -> None:
        """``directory``: that of the keys of clients; None where only the system itself may come in."""
        self._directory = directory
        self._system = system

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the key, in Z85, may come in. A file that is no key lets nobody in, and keeps nobody out."""
        if key == self._system or self._directory is None:
            return key == self._system
        return any(_holds(path, key) for path in self._directory.glob("*.pub"))


def _holds(path: Path, key: bytes) -> bool:
    try:
        return read_key(path) == key
    except DsError:
        return False
