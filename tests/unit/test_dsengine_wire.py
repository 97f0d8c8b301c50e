"""What stages give each other over sockets: it arrives as it was, sealed or not; who leaves ends others' waits."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
import torch
from torch import Tensor

from dsengine.parallel import Part
from dsengine.rank_orders import Wiring
from dsengine.wire import PeerGone, Wires
from dskv.stream import SECRET_NBYTES

PATIENCE_S = 60.0
SECRET = b"s" * SECRET_NBYTES
#: more than a record, and no row at all
SHAPES = [(3, 5), (700, 513), (0, 5), (1, 1)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def wires(stack: ExitStack, rank: int, secret: bytes = b"") -> Wires:
    return stack.enter_context(closing(Wires(Part(1, 3, rank), Wiring("127.0.0.1", "127.0.0.1", secret))))


def met(stack: ExitStack, *secrets: bytes) -> list[Wires]:
    """Three stages that have found each other."""
    each = [wires(stack, rank, secret) for rank, secret in enumerate(secrets)]
    threads = stack.enter_context(ThreadPoolExecutor(3))
    behind = [*(one.where for one in each[1:]), ""]
    meeting = [threads.submit(one.meet, where) for one, where in zip(each, behind, strict=True)]
    for one in meeting:
        one.result(PATIENCE_S)
    return each


@pytest.mark.parametrize("secret", [b"", SECRET], ids=["plain", "sealed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_arrives_in_order(stack: ExitStack, secret: bytes, dtype: torch.dtype) -> None:
    first, middle, last = met(stack, secret, secret, secret)
    given = [torch.randn(shape).to(dtype) for shape in SHAPES]
    with ThreadPoolExecutor(2) as threads:

        def pass_on() -> None:
            for x in given:
                middle.send(middle.receive(tuple(x.shape), dtype) + 1)

        def give() -> None:
            for x in given:
                first.send(x)

        passing, giving = threads.submit(pass_on), threads.submit(give)
        came: list[Tensor] = [last.receive(tuple(x.shape), dtype) for x in given]
        passing.result(PATIENCE_S)
        giving.result(PATIENCE_S)
    assert all(torch.equal(x + 1, y) for x, y in zip(given, came, strict=True))


def test_a_stage_that_is_gone_ends_the_waits_of_its_neighbours(stack: ExitStack) -> None:
    first, middle, last = met(stack, SECRET, SECRET, SECRET)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(last.receive, (1, 4), torch.float32)
        middle.close()
        with pytest.raises(PeerGone, match="the stage before does not answer: the other side has left"):
            waiting.result(PATIENCE_S)
    with pytest.raises(PeerGone, match="the next stage"):
        _send_until_it_fails(first)


def _send_until_it_fails(one: Wires) -> None:
    for _ in range(10_000):
        one.send(torch.zeros(100, 100))


def test_what_was_sealed_with_another_secret_is_not_taken(stack: ExitStack) -> None:
    first, middle, _ = met(stack, b"x" * SECRET_NBYTES, SECRET, SECRET)
    first.send(torch.zeros(1, 4))
    with pytest.raises(PeerGone, match="changed on its way"):
        middle.receive((1, 4), torch.float32)


def test_nobody_gets_in_without_the_token(stack: ExitStack) -> None:
    last = wires(stack, 2)
    host, _, port = last.where.partition("/")[0].rpartition(":")
    middle = wires(stack, 1)
    with socket.create_connection((host, int(port))) as stranger, ThreadPoolExecutor(2) as threads:
        stranger.sendall(bytes(16))
        before = wires(stack, 0)
        meeting = [threads.submit(last.meet, ""), threads.submit(middle.meet, last.where)]
        before.meet(middle.where)
        for one in meeting:
            one.result(PATIENCE_S)
    middle.send(torch.ones(1, 1))
    assert last.receive((1, 1), torch.float32).item() == 1.0


def test_an_address_that_is_not_here_is_told() -> None:
    with pytest.raises(PeerGone, match=r"cannot listen at 192\.0\.2\.1"):
        Wires(Part(1, 2, 1), Wiring("192.0.2.1", "192.0.2.1", b""))
