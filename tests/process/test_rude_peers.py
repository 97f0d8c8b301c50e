"""Garbage and oversized frames on every socket of a running system: it goes on to serve, and says what it refused.

Beside each rude peer a request runs whose tokens are known; KV goes over TCP, so every socket is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from dskv.handle import KvKey
from dskv.stream import TOKEN_NBYTES
from dswire.codec import encode
from dswire.messages import PROTOCOL, client, kv, worker
from support.rude import PeakMemory, RudePeer, garbage, raw_connection, wait_logged
from support.system import System, running_system

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(120)]

TOPOLOGY = """
model: {path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 1024}
router: {frontend: "tcp://127.0.0.1:{port}", worker_lease_s: 15}
relay: {port: {port}}
kv: {blocks: 128}
force_transport: tcp
"""

PROMPT_IDS = tuple(range(1000, 1040))
TOKENS = 24
IDLE_LIMIT_S = 60.0
#: what a process may take while it reads garbage: libzmq's buffers of eight-MiB frames, one of them decoded. The
#: frames sent here are 60 MiB, and read carelessly they would take above 500 MiB
GROWTH_NBYTES = 256 << 20


@dataclass(frozen=True)
class Door:
    """A socket of the system."""

    #: of which process
    owner: str
    address: str
    #: one of its own messages, from a stranger
    asks: bytes
    #: the answer to that
    answer: str
    #: a message that belongs to another socket
    foreign: bytes
    #: what its log says of a message that it cannot take
    told: str


def _doors(system: System) -> dict[str, Door]:
    router, relay = system.topology.router, system.topology.relays[0]
    assert relay.data_connect is not None
    ping, report = encode(client.ClientPing()), encode(worker.WorkerReport(worker.Load()))
    fetch = encode(kv.KvFetch(KvKey("x", 0)))
    unreadable, refused = "unreadable message", "message refused"
    return {
        "frontend": Door("router-0", router.frontend_connect, ping, "ClientHelloWanted", report, unreadable),
        "backend": Door("router-0", router.backend_connect, report, "HelloWanted", ping, unreadable),
        "local": Door("relay-n0", relay.local, encode(kv.KvPong()), "HelloWanted", ping, refused),
        "data": Door("relay-n0", relay.data_connect, fetch, "HelloWanted", report, refused),
    }


DOORS = ("frontend", "backend", "local", "data")


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running_system(TOPOLOGY) as running:
        yield running


@pytest.fixture(scope="module")
def tokens(system: System) -> tuple[int, ...]:
    """What the request beside makes when nobody is rude."""
    return _ask(system)


def _ask(system: System) -> tuple[int, ...]:
    with system.client() as asking:
        made = asking.generate(prompt_ids=PROMPT_IDS, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return tuple(made.choices[0].token_ids)


@dataclass
class Beside:
    """What goes on beside a rude peer."""

    door: Door
    memory: PeakMemory
    answer: Future[tuple[int, ...]]


@pytest.fixture
def beside(system: System, tokens: tuple[int, ...], door: str) -> Iterator[Beside]:
    """A request and a look at the memory; both are checked when the rude peer is gone."""
    pids = {name: system.pid(name) for name in system.topology.process_names()}
    with ThreadPoolExecutor(1) as pool, PeakMemory(pids) as memory:
        yield Beside(_doors(system)[door], memory, answer := pool.submit(_ask, system))
        assert answer.result() == tokens
    assert {name: system.pid(name) for name in pids} == pids
    assert _ask(system) == tokens
    assert {name: grown for name, grown in memory.growth().items() if grown > GROWTH_NBYTES} == {}
    system.await_idle(IDLE_LIMIT_S)


def _hello(door: str, name: str) -> bytes:
    match door:
        case "frontend":
            return encode(client.ClientHello(PROTOCOL))
        case "backend":
            return encode(worker.WorkerHello(PROTOCOL, name, "decode", "n0", "1"))
        case "local":
            return encode(kv.KvHello(PROTOCOL, name, "1"))
    return encode(kv.RelayHello(PROTOCOL, name, "1"))


@pytest.mark.parametrize("door", DOORS)
def test_garbage_of_a_stranger(system: System, beside: Beside, door: str) -> None:
    rude = RudePeer(beside.door.address, identity=b"\xff\x1b[2J" + door.encode())
    for _, frames in garbage():
        rude.send(*frames)
    rude.send(beside.door.foreign)
    rude.send(beside.door.asks)
    answers = rude.answers(until=beside.door.answer)
    if door == "frontend":
        refused = [answer["error"]["code"] for answer in answers if answer["type"] == "ClientRefused"]
        assert refused == ["protocol_error"] * (sum(1 for _ in garbage()) + 1)
    rude.close()
    wait_logged(system.log(beside.door.owner), (beside.door.told, "x1b[2J" + door, "not MessagePack within limits"))


@pytest.mark.parametrize("door", DOORS)
def test_garbage_after_a_hello(beside: Beside, door: str) -> None:
    name = f"rude-{door}"
    rude = RudePeer(beside.door.address, identity=name.encode())
    rude.send(_hello(door, name))
    for _, frames in garbage():
        rude.send(*frames)
    rude.send(beside.door.asks, b"a frame too many")
    if door == "data":
        rude.send(encode(kv.KvFetch(KvKey("x", 0), 1)))
        rude.answers(until="KvFetchFailed")
    else:
        rude.send(_hello(door, name))
        welcome = {"frontend": "ClientWelcome", "backend": "WorkerRefused", "local": "KvWelcome"}[door]
        rude.answers(until=welcome)
        rude.answers(until=welcome)
    rude.close()


@pytest.mark.parametrize("door", DOORS)
def test_a_frame_above_the_limit_costs_its_sender_the_connection(beside: Beside, door: str) -> None:
    rude = RudePeer(beside.door.address)
    rude.oversized()
    rude.close()


@pytest.mark.parametrize("door", DOORS)
def test_bytes_that_are_no_zeromq(beside: Beside, door: str) -> None:
    for content in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 100_000, b"", b"\x16\x03\x01\x02\x00\x01"):
        # it may be cut before all of it is sent
        with raw_connection(beside.door.address) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(content)


def test_strangers_at_the_stream_port(system: System, tokens: tuple[int, ...]) -> None:
    address = system.topology.relays[0].stream_connect
    silent = [raw_connection(str(address)) for _ in range(20)]
    for content in (b"x" * TOKEN_NBYTES, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 100_000, b"half"):
        with raw_connection(str(address)) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(content)
    assert _ask(system) == tokens
    for connection in silent:
        # it is left without a word
        assert connection.recv(1) == b""
        connection.close()


def test_a_peer_that_never_reads_fills_no_memory(system: System, tokens: tuple[int, ...]) -> None:
    with PeakMemory({"router-0": system.pid("router-0")}) as memory:
        rude = RudePeer(system.topology.router.frontend_connect)
        for _ in range(20_000):
            rude.send(b"\xc1")
        assert _ask(system) == tokens
        rude.close()
    assert memory.growth()["router-0"] < GROWTH_NBYTES


def test_a_worker_connection_cannot_pose_as_a_client(system: System, tokens: tuple[int, ...]) -> None:
    rude = RudePeer(system.topology.router.backend_connect, identity=b"client:c-x")
    rude.send(encode(worker.WorkerReport(worker.Load())))
    rude.send(_hello("backend", "decode-9"))
    with system.client() as asking:
        assert asking.status().requests == {}
    assert _ask(system) == tokens
    rude.close()
