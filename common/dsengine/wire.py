"""What the stages of an instance give each other where they are on several nodes: plain sockets, sealed or not.

Each rank listens for the one of its place in the stage before, and calls the one of the stage behind. Numbers go
one way, as they lie in memory; both ends know their shapes. With a secret they go in records as those of
:mod:`dskv.stream`, under a key of their own for each wire. Invariant: a rank that is gone ends the waits of both
its neighbours, at once.
"""

from __future__ import annotations

import hashlib
import socket
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dsengine import door
from dsengine.parallel import Part
from dsengine.rank_orders import PATIENCE_S, Wiring
from dskv.stream import SECRET_NBYTES, Seal, fill, pieces
from dswire.errors import TransferFailed


class PeerGone(RuntimeError):
    """A rank does not answer: the step, and every later one, is lost."""


class Wires:
    """A rank's connections to the stages before and behind. One thread uses them."""

    def __init__(self, part: Part, wiring: Wiring) -> None:
        """Listen, where there is a stage before. Raises :class:`PeerGone` where that cannot be."""
        self._part = part
        self._secret = wiring.secret
        #: where the stage before finds this rank; "" where there is none
        self.where = ""
        self._listener: socket.socket | None = None
        self._before: _End | None = None
        self._behind: _End | None = None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="wire")
        #: what has not yet left; as many as there are steps under way
        self._sent: deque[Future[None]] = deque()
        if not part.first:
            try:
                self._listener, self.where = door.listen(wiring.bind_host, wiring.host)
            except OSError as error:
                raise PeerGone(f"cannot listen at {wiring.bind_host}: {error}") from error

    def meet(self, behind: str) -> None:
        """Connect to both sides; ``behind``: where the stage behind listens, "" where there is none."""
        try:
            if behind:
                self._behind = _End(door.knock(behind, PATIENCE_S), behind, self._secret)
            if self._listener is not None:
                connection = door.accept(self._listener, self.where, PATIENCE_S)
                self._before = _End(connection, self.where, self._secret)
        except OSError as error:
            raise PeerGone(f"{self._part} does not meet its neighbours: {error}") from error

    def send(self, x: Tensor) -> None:
        """Give ``x``, which nobody changes any more, to the stage behind, without waiting for it."""
        assert self._behind is not None
        while len(self._sent) >= self._part.pp:
            self._sent.popleft().result()
        self._sent.append(self._sender.submit(self._behind.send, x))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the stage before gives."""
        assert self._before is not None
        x = torch.empty(shape, dtype=dtype)
        self._before.receive(x)
        return x

    def close(self) -> None:
        """Leave both; only between steps."""
        self._sender.shutdown()
        if self._listener is not None:
            self._listener.close()
        for end in (self._before, self._behind):
            if end is not None:
                end.close()


class _End:
    """One connection, which is used one way. Raises :class:`PeerGone`."""

    def __init__(self, connection: socket.socket, where: str, secret: bytes) -> None:
        self._connection = connection
        key = hashlib.blake2b(door.token_of(where), key=secret, digest_size=SECRET_NBYTES).digest()
        self._seal = Seal(key) if secret else None

    def send(self, x: Tensor) -> None:
        """All of ``x``."""
        try:
            for piece in pieces(_bytes(x.cpu())):
                self._connection.sendall(self._seal.close(piece) if self._seal is not None else piece)
        except OSError as error:
            raise PeerGone(f"the next stage of the instance does not answer: {error}") from error

    def receive(self, x: Tensor) -> None:
        """All of ``x``, which is on the CPU."""
        try:
            for piece in pieces(_bytes(x)):
                fill(self._connection, self._seal.room(len(piece)) if self._seal is not None else piece)
                if self._seal is not None:
                    self._seal.open(piece)
        except (OSError, TransferFailed) as error:
            raise PeerGone(f"the stage before does not answer: {error}") from error

    def close(self) -> None:
        """Leave."""
        self._connection.close()


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().flatten().view(torch.uint8).numpy().data
