"""CURVE keys: who we are, and whom we let in.

A system has one directory of keys (``dsctl keys make``)::

    system.key      the secret key every process of the system serves and calls with; mode 0600
    system.pub      its public half: what a client needs to know the router by
    allowed/*.pub   public keys of clients that may connect, one file each

Servers accept the system's own key and the keys in ``allowed/``; anything else is turned away by libzmq before a
byte of ours is read. A key file holds one Z85 key of 40 characters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from dswire.errors import BadInput, StartFailed

SYSTEM_SECRET = "system.key"
SYSTEM_PUBLIC = "system.pub"
ALLOWED = "allowed"
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


def _read(path: Path) -> bytes:
    try:
        text = path.read_text().strip().encode()
    except OSError as error:
        raise StartFailed(
            f"{path}: the key cannot be read: {error.strerror}", remedy="make the keys with `dsctl keys make`"
        ) from error
    try:
        valid = len(text) == 40 and len(z85.decode(text)) == 32
    except (ValueError, KeyError):
        valid = False
    if not valid:
        raise BadInput(
            f"{path}: is no Z85 key of 40 characters", remedy="make the keys anew with `dsctl keys make`"
        )
    return text


def load_system(directory: Path) -> CurveKeys:
    """The system's own keys. Raises :class:`StartFailed` when they are missing."""
    secret = _read(directory / SYSTEM_SECRET)
    public = zmq.curve_public(secret)
    return CurveKeys(public, secret, public)


def load_client(secret_file: Path, server_file: Path) -> CurveKeys:
    """A client's keys: its own secret, and the system's public key."""
    secret = _read(secret_file)
    return CurveKeys(zmq.curve_public(secret), secret, _read(server_file))


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


def start_authenticator(directory: Path) -> ThreadAuthenticator:
    """Begin to turn away every key but the system's own and those in ``allowed/``; stop it with ``stop()``."""
    keys = load_system(directory)
    allowed = {keys.public} | {_read(path) for path in sorted((directory / ALLOWED).glob("*.pub"))}
    authenticator = ThreadAuthenticator(zmq.Context.instance())
    authenticator.start()
    authenticator.configure_curve_callback(DOMAIN, _AllowList(frozenset(z85.decode(key) for key in allowed)))
    return authenticator


class _AllowList:
    """libzmq hands us the raw key of whoever knocks."""

    def __init__(self, allowed: frozenset[bytes]) -> None:
        self._allowed = allowed

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the key may come in. pyzmq passes it Z85-encoded or raw, depending on its release."""
        return (z85.decode(key) if len(key) == 40 else key) in self._allowed
