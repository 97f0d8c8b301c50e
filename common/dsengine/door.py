"""Where one process listens for one other, which shows the token that it was told."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time

from dskv.stream import fill

TOKEN_NBYTES = 16
#: for which a stranger at the door may keep silent, in seconds
_STRANGER_S = 1.0


def listen(bind_host: str, host: str) -> tuple[socket.socket, str]:
    """A listener on a free port, and what the other is to be told: ``host:port/token``. Raises ``OSError``."""
    listener = socket.create_server((bind_host, 0))
    return listener, f"{host}:{listener.getsockname()[1]}/{secrets.token_hex(TOKEN_NBYTES)}"


def token_of(where: str) -> bytes:
    """The token that is shown at ``where``."""
    return bytes.fromhex(where.partition("/")[2])


def accept(listener: socket.socket, where: str, timeout_s: float) -> socket.socket:
    """The connection of the one who shows the token; nobody is listened to afterwards. Raises ``OSError``."""
    token, end = token_of(where), time.monotonic() + timeout_s
    with listener:
        while True:
            listener.settimeout(max(end - time.monotonic(), 0.001))
            connection, _ = listener.accept()
            connection.settimeout(_STRANGER_S)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(receive(connection, TOKEN_NBYTES), token):
                    return _made(connection, timeout_s)
            connection.close()


def knock(where: str, timeout_s: float) -> socket.socket:
    """A connection to one who listens. Raises ``OSError``."""
    host, _, port = where.partition("/")[0].rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout_s)
    connection.sendall(token_of(where))
    return _made(connection, timeout_s)


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """Exactly so many bytes. Raises ``OSError``, also when the other side has left."""
    data = bytearray(nbytes)
    fill(connection, memoryview(data))
    return bytes(data)


def _made(connection: socket.socket, timeout_s: float) -> socket.socket:
    """With the bound of each wait."""
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
