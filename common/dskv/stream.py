"""KV over a socket: straight out of the owner's pools at one end, straight into the reader's at the other.

Whoever wants KV connects to the relay of the owner's node, sends the token of its ticket, and reads canonical
blocks (``dskv.memory``) one behind the other; both ends know how many and how large. With a secret they come in
records of ``RECORD_NBYTES`` at most, each sealed with AES-256-GCM, its number being the nonce. Invariant: a token
is good once, so no nonce is used twice under a secret. A stream that ends early is the only thing that it can say
of a failure; what it was is told by messages.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dskv.memory import RankPools
from dskv.receive import Receiver
from dswire.errors import TransferFailed
from dswire.messages.kv import Ticket

TOKEN_NBYTES = 16
SECRET_NBYTES = 32
#: of plain bytes
RECORD_NBYTES = 1 << 20
_TAG_NBYTES = 16
_NONCE_NBYTES = 12
#: which must have come before a reader is woken, or else the rest
_AT_ONCE_NBYTES = 256 << 10


class Seal:
    """One direction of a sealed stream; both ends have one each."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(secret)
        self._number = 0
        self._record = memoryview(bytearray(RECORD_NBYTES + _TAG_NBYTES))

    def room(self, nbytes: int) -> memoryview:
        """Where a record of so many plain bytes lies."""
        return self._record[: nbytes + _TAG_NBYTES]

    def close(self, plain: memoryview) -> memoryview:
        """The record of ``plain``."""
        record = self.room(len(plain))
        self._cipher.encrypt_into(self._nonce(), plain, None, record)
        return record

    def open(self, target: memoryview) -> None:
        """What lies in the record, into ``target``. Raises :class:`TransferFailed` for one that was changed."""
        try:
            self._cipher.decrypt_into(self._nonce(), self.room(len(target)), None, target)
        except InvalidTag as error:
            raise TransferFailed("the stream of KV was changed on its way") from error

    def _nonce(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(_NONCE_NBYTES, "little")


class Left(ConnectionResetError):
    """The other side has closed the connection in good order."""


def bound(connection: socket.socket, timeout_s: float) -> None:
    """Have it block for so long at most, which then is a ``BlockingIOError``.

    A socket with a timeout of Python's is asked twice for each read, and reads less at once.
    """
    limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)


def fill(connection: socket.socket, target: memoryview) -> None:
    """Read until ``target`` is full; each wait has the connection's bound. Raises :class:`Left` and ``OSError``."""
    come = 0
    while come < len(target):
        # not for each packet: a reader that sleeps and wakes all the time takes half as much longer
        least = min(len(target) - come, _AT_ONCE_NBYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        count = connection.recv_into(target[come:])
        if not count:
            raise Left("the other side has left")
        come += count


def pieces(data: memoryview) -> Iterator[memoryview]:
    """What goes into a record each."""
    for start in range(0, len(data), RECORD_NBYTES):
        yield data[start : start + RECORD_NBYTES]


def send(connection: socket.socket, secret: bytes, pools: RankPools, blocks: Sequence[int]) -> None:
    """Send ``blocks`` of the owner's pools. Raises ``OSError``; waits for the reader as long as the socket does."""
    if secret:
        send_sealed(connection, secret, pools.canonical(blocks))
    elif pools.single is not None:
        pools.single.send(connection, blocks)
    else:
        for block in pools.canonical(blocks):
            connection.sendall(block)


def send_sealed(connection: socket.socket, secret: bytes, data: Iterable[memoryview]) -> None:
    """Send all of ``data`` in records. Raises ``OSError``."""
    seal = Seal(secret)
    for block in data:
        for piece in pieces(block):
            connection.sendall(seal.close(piece))


class Stream:
    """The reader's end, open within ``with``. One thread reads; :meth:`cut` may come from another."""

    def __init__(self, address: tuple[str, int], ticket: Ticket, timeout_s: float) -> None:
        """``timeout_s``: bound of the connecting and of each wait for more bytes."""
        self._address = address
        self._ticket = ticket
        self._timeout_s = timeout_s
        self._seal = Seal(ticket.secret) if ticket.secret else None
        self._connection: socket.socket | None = None
        self._cut = False

    def __enter__(self) -> Stream:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Connect. Raises :class:`TransferFailed`, and leaves nothing open then."""
        try:
            self._connection = socket.create_connection(self._address, self._timeout_s)
            bound(self._connection, self._timeout_s)
            self._connection.sendall(self._ticket.token)
        except OSError as error:
            self.close()
            raise self._failed(f"cannot be reached: {error}") from error
        if self._cut:
            self.close()
            raise self._failed("was left")

    def bring(self, receiver: Receiver) -> None:
        """Read all that it needs. Raises :class:`TransferFailed`."""
        with self:
            receiver.receive(self.read)

    def read(self, target: memoryview) -> None:
        """Fill ``target``. Raises :class:`TransferFailed`."""
        if self._seal is None:
            self._fill(target)
            return
        for piece in pieces(target):
            self._fill(self._seal.room(len(piece)))
            self._seal.open(piece)

    def cut(self) -> None:
        """Nobody wants the rest: whoever reads is told so at once."""
        self._cut = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave. Doing it twice is harmless."""
        if self._connection is not None:
            self._connection.close()

    def _fill(self, target: memoryview) -> None:
        assert self._connection is not None
        try:
            fill(self._connection, target)
        except BlockingIOError as error:
            raise self._failed(f"sent nothing for {self._timeout_s:g} s") from error
        except Left as error:
            raise self._failed("ended the stream of KV too early") from error
        except OSError as error:
            raise self._failed(f"has gone: {error}") from error

    def _failed(self, what: str) -> TransferFailed:
        host, port = self._address
        return TransferFailed(f"the relay at {host}:{port} {what}")
