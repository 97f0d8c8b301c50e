"""Where two processes meet to make a communicator: a store of torch.distributed over one plain connection.

The one side listens, the other connects and shows the token that it was told. What either sets, the other gets;
communicators of two want no more. Invariant: to leave, or to die, ends every wait of the other side, at once.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

_TOKEN_NBYTES = 16
#: of a key, and of its value
_SIZES = struct.Struct(">II")
#: for which a stranger at the door may keep silent, in seconds
_STRANGER_S = 1.0


class Meeting(Store):
    """One side of it. ``where`` is ``host:port/token``. One thread uses the store; any may :meth:`leave`.

    Its methods raise ``OSError`` when the other side does not come in time, or has left.
    """

    def __init__(self, where: str, timeout_s: float, listener: socket.socket | None = None) -> None:
        """Use :meth:`listen`, or this to connect to one who does; ``timeout_s``: bound of each wait."""
        super().__init__()
        self.where = where
        self._timeout_s = timeout_s
        self._listener = listener
        self._connection: socket.socket | None = None
        self._known: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._left = False

    @classmethod
    def listen(cls, host: str, timeout_s: float) -> Meeting:
        """Be there for one who is told ``where``."""
        listener = socket.create_server((host, 0))
        return cls(f"{host}:{listener.getsockname()[1]}/{secrets.token_hex(_TOKEN_NBYTES)}", timeout_s, listener)

    def meet(self) -> None:
        """Wait for the other side."""
        connection = self._connect() if self._listener is None else self._accept(self._listener)
        connection.settimeout(self._timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._connection = connection
        if self._left:
            connection.close()
        self._check()

    def leave(self) -> None:
        """End it for both sides. Doing it twice is harmless."""
        with self._lock:
            self._left = True
            for end in (self._listener, self._connection):
                if end is not None:
                    with contextlib.suppress(OSError):
                        # whoever waits at it in another thread wakes up; closing alone does not do that
                        end.shutdown(socket.SHUT_RDWR)
                    end.close()

    # torch's interface

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # that is what torch calls it with
        """Tell the other side."""
        self._known[key] = value
        name = key.encode()
        self._open().sendall(_SIZES.pack(len(name), len(value)) + name + value)

    def get(self, key: str) -> bytes:
        """What either side has said, or says soon."""
        while key not in self._known:
            self._read()
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all ``keys`` have been said. The bound is the meeting's own."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all ``keys`` are known here."""
        return all(key in self._known for key in keys)

    def _connect(self) -> socket.socket:
        address, _, token = self.where.partition("/")
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), self._timeout_s)
        connection.sendall(bytes.fromhex(token))
        return connection

    def _accept(self, listener: socket.socket) -> socket.socket:
        """One who shows the token; nobody else is listened to for long."""
        token, end = bytes.fromhex(self.where.partition("/")[2]), time.monotonic() + self._timeout_s
        with listener:
            while True:
                listener.settimeout(max(end - time.monotonic(), 0.001))
                connection, _ = listener.accept()
                connection.settimeout(_STRANGER_S)
                with contextlib.suppress(OSError):
                    if secrets.compare_digest(_receive(connection, _TOKEN_NBYTES), token):
                        return connection
                connection.close()

    def _read(self) -> None:
        """One more of what the other side says."""
        connection = self._open()
        name, value = _SIZES.unpack(_receive(connection, _SIZES.size))
        key = _receive(connection, name).decode()
        self._known[key] = _receive(connection, value)

    def _open(self) -> socket.socket:
        self._check()
        assert self._connection is not None, "it has met"
        return self._connection

    def _check(self) -> None:
        if self._left:
            raise ConnectionAbortedError("the hand-off is over")


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionResetError("the other side has left")
        data += more
    return data
