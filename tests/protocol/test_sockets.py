"""One suite for every transport: ipc, tcp, and the one in memory that other tests run on."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Protocol

import pytest
import zmq

from dstopology.endpoints import free_ports
from dswire.errors import PortInUse, StartFailed
from dswire.sockets import BURST, HIGH_WATER, BoundSocket, ConnectedSocket, OnFrames, PeerUnreachable
from support.memory import Memory
from support.rebind import rebind

PATIENCE_S = 30.0


class Socket(Protocol):
    """What the transports have in common."""

    def start(self, on_frames: OnFrames) -> None:
        """Begin to deliver."""

    def send(self, peer: str, frames: Sequence[bytes | memoryview]) -> None:
        """Send at once or raise."""

    def close(self) -> None:
        """Close."""


@dataclass
class Transport:
    """How to make the two ends of one address."""

    name: str
    bind: Callable[[], Socket]
    bind_small: Callable[[], Socket]
    connect: Callable[[str], Socket]


def zmq_transport(name: str, address: str) -> Transport:
    return Transport(
        name,
        lambda: BoundSocket(address),
        lambda: BoundSocket(address, max_nbytes=1024),
        lambda identity: ConnectedSocket(address, identity),
    )


@pytest.fixture(params=["ipc", "tcp", "memory"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Transport:
    if request.param == "ipc":
        return zmq_transport("ipc", f"ipc://{tmp_path}/socket")
    if request.param == "tcp":
        return zmq_transport("tcp", f"tcp://127.0.0.1:{free_ports()}")
    memory = Memory()
    return Transport(
        "memory",
        lambda: memory.bind("here"),
        lambda: memory.bind("here", max_nbytes=1024),
        lambda identity: memory.connect("here", identity),
    )


class End:
    """A socket with what came in."""

    def __init__(self, one: Socket) -> None:
        self.socket = one
        self.came: asyncio.Queue[tuple[str, list[bytes]]] = asyncio.Queue()
        one.start(lambda peer, frames: self.came.put_nowait((peer, frames)))

    async def next(self) -> tuple[str, list[bytes]]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.came.get()

    def send(self, *frames: bytes | memoryview, peer: str = "") -> None:
        self.socket.send(peer, frames)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def ends(transport: Transport, stack: ExitStack, *identities: str) -> tuple[End, list[End]]:
    """A bound end and connected ones; closed by ``stack``."""
    bound = End(stack.enter_context(closing(transport.bind())))
    return bound, [End(stack.enter_context(closing(transport.connect(identity)))) for identity in identities]


async def unreachable(bound: End, peer: str) -> None:
    """Send until the peer cannot be reached; libzmq tells of a closed connection in no other way."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                bound.send(b"are you there?", peer=peer)
            except PeerUnreachable:
                return
            await asyncio.sleep(0.005)


async def test_peers_are_known_by_identity_and_answered_apart(transport: Transport, stack: ExitStack) -> None:
    bound, (ann, bob) = ends(transport, stack, "ann", "bob")
    ann.send(b"from ann")
    bob.send(b"from bob")
    assert sorted([await bound.next(), await bound.next()]) == [("ann", [b"from ann"]), ("bob", [b"from bob"])]
    bound.send(b"to bob", peer="bob")
    bound.send(b"to ann", peer="ann")
    assert await ann.next() == ("", [b"to ann"])
    assert await bob.next() == ("", [b"to bob"])


async def test_messages_arrive_in_order_whole_and_once(transport: Transport, stack: ExitStack) -> None:
    bound, (ann,) = ends(transport, stack, "ann")
    numbers = [str(number).encode() for number in range(5 * BURST + 3)]
    for number in numbers:
        ann.send(number, memoryview(number * 2), b"")
    assert [await bound.next() for _ in numbers] == [("ann", [number, number * 2, b""]) for number in numbers]
    for number in numbers:
        bound.send(number, peer="ann")
    assert [(await ann.next())[1] for _ in numbers] == [[number] for number in numbers]
    assert bound.came.empty()
    assert ann.came.empty()


async def test_raw_frames_of_any_bytes(transport: Transport, stack: ExitStack) -> None:
    bound, (ann,) = ends(transport, stack, "ann")
    every_byte = bytes(range(256)) * 4096
    ann.send(b"header", every_byte)
    assert await bound.next() == ("ann", [b"header", every_byte])


async def test_identities_need_not_be_text(transport: Transport, stack: ExitStack) -> None:
    bound, (odd,) = ends(transport, stack, "dé/çodé:1")
    odd.send(b"hello")
    peer, _ = await bound.next()
    bound.send(b"hello yourself", peer=peer)
    assert await odd.next() == ("", [b"hello yourself"])


async def test_a_peer_never_seen_is_unreachable_at_once(transport: Transport, stack: ExitStack) -> None:
    bound, _ = ends(transport, stack)
    with pytest.raises(PeerUnreachable):
        bound.send(b"hello", peer="nobody")


async def test_a_peer_that_left_becomes_unreachable(transport: Transport, stack: ExitStack) -> None:
    bound, (ann, bob) = ends(transport, stack, "ann", "bob")
    ann.send(b"hello")
    bob.send(b"hello")
    await bound.next()
    await bound.next()
    ann.socket.close()
    await unreachable(bound, "ann")
    bound.send(b"still there", peer="bob")
    assert await bob.next() == ("", [b"still there"])


async def test_what_is_sent_while_nobody_listens_arrives_when_somebody_does(
    transport: Transport, stack: ExitStack
) -> None:
    ann = End(stack.enter_context(closing(transport.connect("ann"))))
    ann.send(b"early")
    ann.send(b"bird")
    bound = End(stack.enter_context(closing(transport.bind())))
    assert [await bound.next(), await bound.next()] == [("ann", [b"early"]), ("ann", [b"bird"])]


async def test_a_restarted_listener_is_found_again(transport: Transport, stack: ExitStack) -> None:
    first, (ann,) = ends(transport, stack, "ann")
    ann.send(b"one")
    await first.next()
    first.socket.close()
    second = End(stack.enter_context(closing(await rebind(transport.bind))))
    async with asyncio.timeout(PATIENCE_S):
        while second.came.empty():
            # the message that finds the connection broken may be lost with it
            ann.send(b"two")
            await asyncio.sleep(0.01)
    assert await second.next() == ("ann", [b"two"])
    second.send(b"welcome back", peer="ann")
    assert await ann.next() == ("", [b"welcome back"])


async def test_a_peer_that_comes_back_under_its_identity_takes_it_over(
    transport: Transport, stack: ExitStack
) -> None:
    bound, (old, new) = ends(transport, stack, "ann", "other")
    old.send(b"old")
    await bound.next()
    new.socket.close()
    new = End(stack.enter_context(closing(transport.connect("ann"))))
    new.send(b"new")
    assert await bound.next() == ("ann", [b"new"])
    bound.send(b"for the new one", peer="ann")
    assert await new.next() == ("", [b"for the new one"])
    assert old.came.empty()


async def test_a_full_queue_raises_and_loses_nothing_that_was_taken(transport: Transport, stack: ExitStack) -> None:
    ann = End(stack.enter_context(closing(transport.connect("ann"))))
    for number in range(HIGH_WATER):
        ann.send(number.to_bytes(4))
    with pytest.raises(PeerUnreachable):
        ann.send(b"one too many")
    bound = End(stack.enter_context(closing(transport.bind())))
    for number in range(HIGH_WATER):
        assert await bound.next() == ("ann", [number.to_bytes(4)])


async def test_an_oversized_frame_is_never_delivered_and_harms_no_other(
    transport: Transport, stack: ExitStack
) -> None:
    bound = End(stack.enter_context(closing(transport.bind_small())))
    rude = End(stack.enter_context(closing(transport.connect("rude"))))
    bob = End(stack.enter_context(closing(transport.connect("bob"))))
    bob.send(b"before")
    assert await bound.next() == ("bob", [b"before"])
    rude.send(b"x" * 1025)
    rude.send(b"small again")
    bob.send(b"x" * 1024)
    senders = {(await bound.next())[0]}
    assert senders <= {"bob", "rude"}
    bob.send(b"after")
    bound.send(b"to bob", peer="bob")
    assert await bob.next() == ("", [b"to bob"])
    await asyncio.wait_for(_drain_until(bound, b"after"), PATIENCE_S)


async def _drain_until(end: End, last: bytes) -> None:
    while True:
        _, (frame,) = await end.next()
        assert len(frame) <= 1024
        if frame == last:
            return


async def test_nothing_is_delivered_after_close_and_closing_twice_is_harmless(
    transport: Transport, stack: ExitStack
) -> None:
    bound, (ann,) = ends(transport, stack, "ann")
    ann.send(b"one")
    await bound.next()
    bound.send(b"two", peer="ann")
    bound.send(b"three", peer="ann")
    ann.socket.close()
    ann.socket.close()
    await unreachable(bound, "ann")
    assert ann.came.empty()
    bound.socket.close()
    bound.socket.close()


async def test_closing_inside_the_callback_stops_delivery(transport: Transport, stack: ExitStack) -> None:
    bound = stack.enter_context(closing(transport.bind()))
    came: list[bytes] = []
    done = asyncio.Event()

    def take(_: str, frames: list[bytes]) -> None:
        came.append(frames[0])
        bound.close()
        done.set()

    bound.start(take)
    ann = End(stack.enter_context(closing(transport.connect("ann"))))
    ann.send(b"one")
    ann.send(b"two")
    async with asyncio.timeout(PATIENCE_S):
        await done.wait()
    await asyncio.sleep(0)
    assert came == [b"one"]


# not over ipc: libzmq replaces the socket file, and it is the supervisor's lock that keeps two systems apart
@pytest.mark.parametrize("transport", ["tcp", "memory"], indirect=True)
async def test_an_address_in_use_is_refused(transport: Transport, stack: ExitStack) -> None:
    stack.enter_context(closing(transport.bind()))
    with pytest.raises(PortInUse):
        transport.bind()


@pytest.mark.parametrize("address", ["nonsense", "tcp://256.1.1.1:5555", "ipc:///no/such/dir/s"])
def test_an_address_that_cannot_be_bound_says_so(address: str) -> None:
    with pytest.raises(StartFailed, match="cannot be bound"):
        BoundSocket(address)


def test_an_address_that_cannot_be_called_says_so() -> None:
    with pytest.raises(StartFailed, match="nonsense"):
        ConnectedSocket("nonsense", "ann")


#: a process that binds or connects, takes nothing for a while, and then says what it has got
BUSY = """
import asyncio, sys, time
from dswire import sockets
sockets.HIGH_WATER = 100
kind, address = sys.argv[1:]
async def main():
    got = []
    end = sockets.BoundSocket(address) if kind == "bound" else sockets.ConnectedSocket(address, "busy")
    end.start(lambda peer, frames: got.append(frames))
    if kind == "connected":
        end.send("", [b"here"])
    print("up", flush=True)
    time.sleep(5.0)
    while not got:
        await asyncio.sleep(0.01)
    end.close()
    print("alive", flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["bound", "connected"])
def test_a_peer_that_floods_and_leaves_ends_nobody(kind: str) -> None:
    """libzmq's heartbeats end a process whose queue such a peer has filled (its issue 4841)."""
    address = f"tcp://127.0.0.1:{free_ports()}"
    rude: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER if kind == "bound" else zmq.ROUTER)
    with rude, Popen([sys.executable, "-c", BUSY, kind, address], stdout=PIPE) as busy:
        rude.setsockopt(zmq.LINGER, 0)
        rude.setsockopt(zmq.SNDHWM, 0)
        to = [] if kind == "bound" else [b"busy"]
        if kind == "connected":
            rude.bind(address)
            assert rude.poll(int(1000 * PATIENCE_S))
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"up\n"
        if kind == "bound":
            rude.connect(address)
        # more than the system's buffers hold, so that the connection ends with messages on their way
        for _ in range(200):
            rude.send_multipart([*to, bytes(200_000)])
        time.sleep(0.5)
        rude.close()
        assert busy.stdout.readline() == b"alive\n"
        assert busy.wait(PATIENCE_S) == 0
