"""The stream port of a relay on real sockets: who gets the KV, and what happens to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dskv.handle import KvHandle
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import Segment
from dskv.stream import TOKEN_NBYTES, Stream
from dsrelay import streams as stream_port
from dsrelay.streams import MAX_STRANGERS, PROOF_NBYTES, Streams, read_proof
from dstopology.endpoints import Tcp, free_ports
from dswire.errors import KvCorrupt, PortInUse, TransferFailed
from dswire.messages.kv import KvProof, Ticket
from support.handles import LAYOUT, make_handle, make_pool, offered, ranks

PATIENCE_S = 30.0
BLOCKS = (5, 2, 9, 0, 7)
OWN = (1, 3, 5, 7, 9)
LARGE_NBYTES = 64 << 20


class Port:
    """A stream port, an owner's pool and a reader's."""

    def __init__(self, directory: Path, *, sealed: bool, timeout_s: float = PATIENCE_S) -> None:
        self.address = Tcp("127.0.0.1", free_ports())
        self.streams = Streams(self.address, 2, timeout_s, sealed=sealed)
        self.owner = make_pool(directory / "owner.kv", 12)
        self.own = Segment.create(directory / "own.kv", 12, LAYOUT.block_nbytes)
        self.handle = offered(self.owner, "r1/0", BLOCKS, owner="prefill-0", node="n0")

    def stream(self, ticket: Ticket) -> Stream:
        return Stream(self.address.pair, ticket, PATIENCE_S)

    async def pull(self, ticket: Ticket, handle: KvHandle | None = None) -> None:
        receiver = Receiver(handle or self.handle, RankPools.of(LAYOUT, self.own), OWN)
        await asyncio.to_thread(self.stream(ticket).bring, receiver)
        receiver.verify()

    def close(self) -> None:
        self.streams.close()
        self.owner.close()
        self.own.close()


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
async def port(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Port]:
    made = Port(tmp_path, sealed=request.param)
    made.streams.start()
    yield made
    made.close()


async def test_who_has_a_ticket_gets_the_kv_once(port: Port) -> None:
    ticket = port.streams.ticket(port.handle)
    await port.pull(ticket)
    for theirs, mine in zip(BLOCKS, OWN, strict=True):
        assert bytes(port.own.slot(mine)) == bytes(port.owner.slot(theirs))
    with pytest.raises(TransferFailed, match=r"too early|has gone"):
        await port.pull(ticket)


async def test_an_owner_of_several_ranks_is_put_together(port: Port, tmp_path: Path) -> None:
    with ranks(tmp_path / "ranks", 2, 2, LAYOUT.block_size, tokens=18) as owner:
        blocks = range(LAYOUT.blocks_for(18))
        handle = make_handle(blocks=blocks, checksum=owner.checksum(blocks))
        handle = msgspec.structs.replace(handle, tokens=18, shards=owner.placement.shards, segment_blocks=10)
        await port.pull(port.streams.ticket(handle), handle)


async def test_a_later_ticket_makes_the_first_one_void(port: Port) -> None:
    first, second = port.streams.ticket(port.handle), port.streams.ticket(port.handle)
    with pytest.raises(TransferFailed):
        await port.pull(first)
    await port.pull(second)


async def test_a_revoked_ticket_is_good_for_nothing(port: Port) -> None:
    ticket = port.streams.ticket(port.handle)
    port.streams.revoke(port.handle.key)
    with pytest.raises(TransferFailed):
        await port.pull(ticket)


async def test_a_guess_gets_nothing(port: Port) -> None:
    port.streams.ticket(port.handle)
    with pytest.raises(TransferFailed):
        await port.pull(Ticket(b"\0" * TOKEN_NBYTES))


async def test_an_owner_that_is_gone_ends_the_stream(port: Port) -> None:
    ticket = port.streams.ticket(port.handle)
    port.owner.close()
    with pytest.raises(TransferFailed):
        await port.pull(ticket)


async def test_a_stream_that_is_revoked_in_the_middle_ends(port: Port) -> None:
    big = Tcp("127.0.0.1", port.address.port)
    ticket = port.streams.proof("somebody")
    reader = Stream(big.pair, ticket, PATIENCE_S)
    await asyncio.to_thread(reader.open)
    await asyncio.to_thread(reader.read, memoryview(bytearray(1 << 20)))
    port.streams.revoke("somebody")
    with pytest.raises(TransferFailed):
        # more than what may have been on its way
        await asyncio.to_thread(reader.read, memoryview(bytearray(LARGE_NBYTES)))
    reader.close()


async def test_a_reader_that_cuts_its_stream_is_told_at_once(port: Port) -> None:
    reader = port.stream(Ticket(b"\0" * TOKEN_NBYTES))
    listener = socket.create_server(("127.0.0.1", 0))
    silent = Stream(listener.getsockname(), Ticket(b"x" * TOKEN_NBYTES), PATIENCE_S)
    await asyncio.to_thread(silent.open)
    reading = asyncio.create_task(asyncio.to_thread(silent.read, memoryview(bytearray(8))))
    await asyncio.sleep(0)
    silent.cut()
    with pytest.raises(TransferFailed):
        async with asyncio.timeout(PATIENCE_S):
            await reading
    reader.cut()
    with pytest.raises(TransferFailed, match="was left"):
        await asyncio.to_thread(reader.open)
    for end in (reader, silent, listener):
        end.close()


async def test_strangers_are_dismissed_and_too_many_turned_away(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_port, "MAX_STRANGERS", 4)
    monkeypatch.setattr(stream_port, "TOKEN_S", 0.2)
    assert MAX_STRANGERS > 4
    loop = asyncio.get_running_loop()
    crowd = [socket.create_connection(port.address.pair) for _ in range(6)]
    for one in crowd:
        one.setblocking(False)
        async with asyncio.timeout(PATIENCE_S):
            assert await loop.sock_recv(one, 1) == b""
        one.close()
    await port.pull(port.streams.ticket(port.handle))


async def test_a_token_may_come_in_pieces(port: Port) -> None:
    ticket = port.streams.proof("somebody")
    loop = asyncio.get_running_loop()
    with socket.create_connection(port.address.pair) as connection:
        connection.setblocking(False)
        for at in range(TOKEN_NBYTES):
            await loop.sock_sendall(connection, ticket.token[at : at + 1])
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            assert await loop.sock_recv(connection, 1)


async def test_the_rate_of_a_path_can_be_told(port: Port) -> None:
    proof = KvProof(port.streams.proof("relay-n1"), PROOF_NBYTES)
    assert await asyncio.to_thread(read_proof, port.address, proof, PATIENCE_S) > 0
    for wrong in (0, PROOF_NBYTES + 1):
        with pytest.raises(TransferFailed):
            read_proof(port.address, msgspec.structs.replace(proof, nbytes=wrong), PATIENCE_S)


async def test_a_port_in_use_is_told(port: Port) -> None:
    with pytest.raises(PortInUse, match=str(port.address.port)):
        Streams(port.address, 1, PATIENCE_S, sealed=False)


async def test_a_reader_that_takes_nothing_is_left(tmp_path: Path) -> None:
    port = Port(tmp_path, sealed=False, timeout_s=0.2)
    port.streams.start()
    # far more than the system keeps for a reader
    much = msgspec.structs.replace(port.handle, blocks=BLOCKS * (LARGE_NBYTES // LAYOUT.block_nbytes // 5))
    ticket = port.streams.ticket(much)
    with socket.create_connection(port.address.pair, PATIENCE_S) as lazy:
        lazy.sendall(ticket.token)
        async with asyncio.timeout(PATIENCE_S):
            for active in (1, 0):
                while port.streams.active != active:
                    await asyncio.sleep(0.01)
        assert await asyncio.to_thread(take_all, lazy) < much.nbytes
    port.close()


def take_all(connection: socket.socket) -> int:
    """Bytes until the end of a connection."""
    taken = 0
    with contextlib.suppress(ConnectionError):
        while come := len(connection.recv(1 << 20)):
            taken += come
    return taken


@pytest.mark.parametrize(("sealed", "error"), [(False, KvCorrupt), (True, TransferFailed)])
@pytest.mark.parametrize("what", ["flipped", "cut", "doubled"])
async def test_what_is_changed_on_the_way_is_found(
    tmp_path: Path, sealed: bool, error: type[Exception], what: str
) -> None:
    port = Port(tmp_path, sealed=sealed)
    port.streams.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        middle = threading.Thread(target=meddle, args=(listener, port.address, what))
        middle.start()
        port.address = Tcp(*listener.getsockname())
        with pytest.raises(TransferFailed if what == "cut" else error):
            await port.pull(port.streams.ticket(port.handle))
        middle.join()
    port.close()


def meddle(listener: socket.socket, address: Tcp, what: str) -> None:
    """Pass one connection on, with the first KB of the answer changed."""
    near, _ = listener.accept()
    with near, socket.create_connection(address.pair) as far:
        far.sendall(near.recv(TOKEN_NBYTES, socket.MSG_WAITALL))
        answer = bytearray()
        while come := far.recv(1 << 16):
            answer += come
        answer[100] ^= what == "flipped"
        if what == "cut":
            del answer[-1:]
        elif what == "doubled":
            answer[0:0] = answer[:64]
        try:
            near.sendall(answer)
        except ConnectionError:
            # it has seen enough
            return
