"""Where two processes meet to make a communicator: a store of torch.distributed over one plain connection.

The one side listens, the other connects and shows the token that it was told. What either sets, the other gets;
communicators of two want no more. Invariant: to leave, or to die, ends every wait of the other side, at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from dsengine.door import accept, knock, listen, receive

#: of a key, and of its value
_SIZES = struct.Struct(">II")


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
        #: threads at a socket
        self._users = 0

    @classmethod
    def listen(cls, host: str, timeout_s: float) -> Meeting:
        """Be there for one who is told ``where``."""
        listener, where = listen(host, host)
        return cls(where, timeout_s, listener)

    def meet(self) -> None:
        """Wait for the other side."""
        with self._using():
            if self._listener is None:
                connection = knock(self.where, self._timeout_s)
            else:
                connection = accept(self._listener, self.where, self._timeout_s)
            with self._lock:
                self._connection = connection
            self._check()

    def leave(self) -> None:
        """End it for both sides. Doing it twice is harmless."""
        with self._lock:
            self._left = True
            for end in self._ends():
                with contextlib.suppress(OSError):
                    # whoever waits at it in another thread wakes up; closing alone does not do that
                    end.shutdown(socket.SHUT_RDWR)
            self._close_unused()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """While somebody is about to wait at a socket it stays open: its number may soon be that of another one."""
        with self._lock:
            self._check()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        if self._left and not self._users:
            for end in self._ends():
                end.close()

    def _ends(self) -> list[socket.socket]:
        return [end for end in (self._listener, self._connection) if end is not None]

    # torch's interface

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # that is what torch calls it with
        """Tell the other side."""
        self._known[key] = value
        name = key.encode()
        with self._using():
            self._there().sendall(_SIZES.pack(len(name), len(value)) + name + value)

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

    def _read(self) -> None:
        """One more of what the other side says."""
        with self._using():
            connection = self._there()
            name, value = _SIZES.unpack(receive(connection, _SIZES.size))
            key = receive(connection, name).decode()
            self._known[key] = receive(connection, value)

    def _there(self) -> socket.socket:
        assert self._connection is not None, "it has met"
        return self._connection

    def _check(self) -> None:
        if self._left:
            raise ConnectionAbortedError("the hand-off is over")
