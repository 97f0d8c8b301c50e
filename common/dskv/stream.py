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
#: buffers that one call of ``sendmsg`` is given
_TOGETHER = 16


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


def fill(connection: socket.socket, target: memoryview) -> None:
    """Read until ``target`` is full; each wait has the connection's bound. Raises :class:`Left` and ``OSError``."""
    come = 0
    while come < len(target):
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
    data = pools.canonical(blocks)
    if secret:
        send_sealed(connection, secret, data)
    elif pools.single is None:
        for block in data:
            connection.sendall(block)
    else:
        _send_together(connection, list(data))


def send_sealed(connection: socket.socket, secret: bytes, data: Iterable[memoryview]) -> None:
    """Send all of ``data`` in records. Raises ``OSError``."""
    seal = Seal(secret)
    for block in data:
        for piece in pieces(block):
            connection.sendall(seal.close(piece))


def _send_together(connection: socket.socket, blocks: list[memoryview]) -> None:
    """Fewer calls than one for each block, which may be small."""
    at = 0
    while at < len(blocks):
        sent = connection.sendmsg(blocks[at : at + _TOGETHER])
        while at < len(blocks) and sent >= len(blocks[at]):
            sent -= len(blocks[at])
            at += 1
        if sent:
            blocks[at] = blocks[at][sent:]


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
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        except TimeoutError as error:
            raise self._failed(f"sent nothing for {self._timeout_s:g} s") from error
        except Left as error:
            raise self._failed("ended the stream of KV too early") from error
        except OSError as error:
            raise self._failed(f"has gone: {error}") from error

    def _failed(self, what: str) -> TransferFailed:
        host, port = self._address
        return TransferFailed(f"the relay at {host}:{port} {what}")
