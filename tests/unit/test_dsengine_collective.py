"""KV by communicators, over Gloo: what arrives, and what the other side sees when one fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dsengine.collective import Collective
from dsengine.meeting import Meeting
from dskv.receive import Receiver
from dswire.errors import TransferFailed

PATIENCE_S = 20.0
CPU = torch.device("cpu")


@pytest.fixture
def owner() -> Iterator[Collective]:
    made = Collective(CPU, "127.0.0.1", PATIENCE_S)
    yield made
    made.close()


@pytest.fixture
def reader() -> Iterator[Collective]:
    made = Collective(CPU, "127.0.0.1", PATIENCE_S)
    yield made
    made.close()


def blocks(count: int, nbytes: int) -> list[memoryview]:
    draw = random.Random(count)
    return [memoryview(bytearray(draw.randbytes(nbytes))) for _ in range(count)]


class Target:
    """Takes blocks, and has something done after the first."""

    def __init__(self, count: int, nbytes: int, after: Callable[[], None] = lambda: None) -> None:
        self.blocks = [bytearray(nbytes) for _ in range(count)]
        self.handle = SimpleNamespace(blocks=range(count), layout=SimpleNamespace(block_nbytes=nbytes))
        self._after = after

    def receive(self, read: Callable[[memoryview], None]) -> None:
        for at, block in enumerate(self.blocks):
            read(memoryview(block))
            if at == 0:
                self._after()


def bring(reader: Collective, meeting: str, target: Target) -> None:
    reader.incoming("prefill-0", meeting).bring(cast("Receiver", target))


def send(owner: Collective, data: list[memoryview]) -> tuple[str, Future[None]]:
    return owner.send("decode-0/1", data)


@pytest.mark.parametrize(("count", "nbytes"), [(1, 10), (7, 300), (3, 1 << 20)])
def test_the_bytes_arrive(owner: Collective, reader: Collective, count: int, nbytes: int) -> None:
    data = blocks(count, nbytes)
    meetings = set()
    for _ in range(3):
        meeting, sent = send(owner, data)
        bring(reader, meeting, target := Target(count, nbytes))
        assert target.blocks == data
        sent.result(PATIENCE_S)
        meetings.add(meeting)
    assert len(meetings) == 1, "the communicator is used again"


def test_a_reader_that_leaves_ends_the_sending_and_comes_back(reader: Collective) -> None:
    # Gloo may forget a message that it was about to write: then the wait for it ends when its time is over
    owner = Collective(CPU, "127.0.0.1", 5.0)
    # more than a connection holds
    meeting, sent = send(owner, blocks(40, 1 << 20))
    with pytest.raises(TransferFailed, match="nothing comes"):
        bring(reader, meeting, Target(40, 1 << 20, lambda: reader.drop("prefill-0")))
    with pytest.raises(TransferFailed, match="cannot be sent to"):
        sent.result(PATIENCE_S)
    small = blocks(2, 700)
    meeting, sent = send(owner, small)
    bring(reader, meeting, target := Target(2, 700))
    assert target.blocks == small
    sent.result(PATIENCE_S)
    owner.close()


def test_an_owner_that_leaves_ends_the_waiting(owner: Collective, reader: Collective) -> None:
    # the second block never comes
    meeting, sent = send(owner, blocks(1, 1000))
    with pytest.raises(TransferFailed, match="nothing comes"):
        bring(reader, meeting, Target(2, 1000, lambda: owner.drop("decode-0/1")))
    sent.result(PATIENCE_S)


def test_one_that_is_cut_before_it_began_ends_at_once(owner: Collective, reader: Collective) -> None:
    meeting, sent = send(owner, blocks(1, 1000))
    incoming = reader.incoming("prefill-0", meeting)
    incoming.cut()
    with pytest.raises(TransferFailed, match="over"):
        incoming.bring(cast("Receiver", Target(1, 1000)))
    owner.drop("decode-0/1")
    with pytest.raises(TransferFailed, match="cannot be sent to"):
        sent.result(PATIENCE_S)


def test_what_was_left_before_it_began_goes_nowhere_else(owner: Collective, reader: Collective) -> None:
    # one at a time: the second waits for the first, and nobody meets that
    _, first = owner.send("decode-1/1", blocks(1, 500))
    _, stale = send(owner, blocks(2, 100))
    owner.drop("decode-0/1")
    meeting, sent = send(owner, blocks(1, 100))
    owner.drop("decode-1/1")
    bring(reader, meeting, target := Target(1, 100))
    assert target.blocks == blocks(1, 100)
    sent.result(PATIENCE_S)
    for over in (first, stale):
        with pytest.raises(TransferFailed):
            over.result(PATIENCE_S)


def test_an_owner_that_waits_can_leave(owner: Collective) -> None:
    meeting, sent = send(owner, blocks(1, 1000))
    owner.drop("decode-0/1", "another:1/meeting")
    assert not sent.done()
    owner.drop("decode-0/1", meeting)
    with pytest.raises(TransferFailed, match="cannot be sent to"):
        sent.result(PATIENCE_S)


def test_nobody_waits_for_ever() -> None:
    hasty = Collective(CPU, "127.0.0.1", 0.3)
    _, sent = send(hasty, blocks(1, 10))
    with pytest.raises(TransferFailed, match="cannot be sent to"):
        sent.result(PATIENCE_S)
    with pytest.raises(TransferFailed, match="cannot be met"):
        bring(hasty, "127.0.0.1:1/00", Target(1, 10))
    hasty.close()


def test_who_has_no_token_is_not_met(owner: Collective, reader: Collective) -> None:
    meeting, sent = send(owner, blocks(1, 10))
    with pytest.raises(TransferFailed, match="cannot be met"):
        bring(reader, meeting.partition("/")[0] + "/" + "00" * 16, Target(1, 10))
    bring(reader, meeting, target := Target(1, 10))
    sent.result(PATIENCE_S)
    assert target.blocks == blocks(1, 10)


def test_a_trial_tells_a_rate_beside_a_hand_off_that_waits(owner: Collective, reader: Collective) -> None:
    waiting, sent = send(owner, data := blocks(3, 1000))
    meeting, shown = owner.meet()
    assert reader.read_rate("prefill-0", meeting) > 0
    shown.result(PATIENCE_S)
    bring(reader, waiting, target := Target(3, 1000))
    assert target.blocks == data
    sent.result(PATIENCE_S)


def test_a_trial_with_nobody_ends_on_both_sides(reader: Collective) -> None:
    hasty = Collective(CPU, "127.0.0.1", 0.3)
    meeting, shown = hasty.meet()
    with pytest.raises(TransferFailed, match="nobody could be met"):
        shown.result(PATIENCE_S)
    with pytest.raises(TransferFailed, match="prefill-0 cannot be met"):
        reader.read_rate("prefill-0", meeting)
    hasty.close()


def test_one_that_closes_waits_for_no_trial() -> None:
    patient = Collective(CPU, "127.0.0.1", 1000.0)
    _, shown = patient.meet()
    patient.close()
    assert shown.cancelled() or shown.exception(PATIENCE_S) is not None


def test_a_socket_that_somebody_waits_at_keeps_its_number_until_they_have_left() -> None:
    meeting = Meeting.listen("127.0.0.1", PATIENCE_S)
    listener = meeting._listener
    assert listener is not None
    with meeting._using():
        meeting.leave()
        assert listener.fileno() >= 0, "the next socket would have it, and who waits would wait at that"
    assert listener.fileno() < 0
    with pytest.raises(ConnectionAbortedError):
        meeting.meet()
