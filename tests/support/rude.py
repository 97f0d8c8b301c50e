"""What a rude peer sends: frames that are no messages, and messages that nobody at that socket takes."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from dswire.codec import MAX_FRAME_NBYTES

#: a peer that is not answered for this long, in seconds, was not served
ANSWER_LIMIT_S = 30


def _declared(code: int, length: int) -> bytes:
    return bytes([code]) + struct.pack(">I", length)


def garbage() -> Iterator[tuple[str, list[bytes]]]:
    """Name and frames of messages that no socket takes."""
    random_bytes = random.Random(7)
    for size in (1, 2, 7, 64, 1_000, 100_000):
        yield f"{size} random bytes", [b"\xc1" + random_bytes.randbytes(size)]
    yield "an empty frame", [b""]
    yield "many empty frames", [b""] * 1_000
    yield "an envelope's delimiter", [b"", msgpack.packb({"type": "ClientHello", "protocol": 1})]
    yield "a message cut short", [msgpack.packb({"type": "Submit", "request_id": "r"})[:-3]]
    yield "a message and a half", [msgpack.packb({"type": "ClientPing"}) * 2 + b"\x81"]
    yield "deep lists", [b"\x91" * 100_000]
    yield "deep maps", [b"\x81\xa1a" * 100_000]
    for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF):
        yield f"four billion of {code:#x}", [_declared(code, 2**32 - 1)]
    yield "empty lists without end", [_declared(0xDD, 1 << 20) + b"\x90" * (1 << 20)] * 2
    yield "many lists of many lists", [b"\x97" + (_declared(0xDD, 1 << 20) + b"\x90" * (1 << 20)) * 7]
    yield "numbers only", [_declared(0xDD, 900_000) + b"\xcb12345678" * 900_000]
    yield "no text", [_declared(0xDB, 7 << 20) + b"\xff" * (7 << 20)]
    for value in (None, 1, "Submit", [], {}, {"type": 5}, {"type": "Nothing"}, {1: 2}, [["type", "Submit"]]):
        yield f"the value {value!r}", [msgpack.packb(value)]
    yield "a long type", [msgpack.packb({"type": "x" * (7 << 20)})]
    yield "a long key", [msgpack.packb({"type": "Submit", "request_id": "r", "sampling": {"x" * (7 << 20): 1}})]
    yield "bytes inside", [msgpack.packb({"type": "Submit", "request_id": b"r"})]


class RudePeer:
    """A DEALER socket that sends whatever; everything is synchronous."""

    def __init__(self, address: str, identity: bytes | None = None) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, identity or uuid.uuid4().hex.encode())
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)

    def send(self, *frames: bytes) -> None:
        """Send a message."""
        self._socket.send_multipart(frames)

    def answers(self, until: str) -> list[dict[str, Any]]:
        """What comes, up to and including a message of that type."""
        told: list[dict[str, Any]] = []
        while not told or told[-1]["type"] != until:
            assert self._socket.poll(1000 * ANSWER_LIMIT_S), f"no {until} after {told}"
            told.append(msgpack.unpackb(self._socket.recv_multipart()[0]))
        return told

    def oversized(self) -> None:
        """Send a frame above the limit; returns when the connection was cut for it."""
        self.send(b"\x00" * (4 * MAX_FRAME_NBYTES))
        assert self._monitor.poll(1000 * ANSWER_LIMIT_S), "the connection stands"
        assert recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED

    def close(self) -> None:
        """Be gone."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def raw_connection(address: str) -> socket.socket:
    """A plain stream to a ZeroMQ address."""
    if address.startswith("ipc://"):
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(address.removeprefix("ipc://"))
        return stream
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=ANSWER_LIMIT_S)


def resident_nbytes(pid: int) -> int:
    """Memory of a process that is its own: what is shared with others or with a file does not count; 0 for none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    # a process that has ended and was not waited for has no such line
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


class PeakMemory:
    """Watches the memory of processes; sampled, so a peak shorter than ``EVERY_S`` may be missed."""

    EVERY_S = 0.05

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: resident_nbytes(pid) for name, pid in pids.items()}
        self._peak = dict(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def growth(self) -> dict[str, int]:
        """Bytes that each process had at its peak above what it had in the beginning."""
        return {name: self._peak[name] - self._before[name] for name in self._pids}

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY_S):
            for name, pid in self._pids.items():
                self._peak[name] = max(self._peak[name], resident_nbytes(pid))


def wait_logged(path: Path, texts: tuple[str, ...], limit_s: float = 10.0) -> None:
    """Until a log holds all of ``texts``."""
    deadline = time.monotonic() + limit_s
    while missing := [text for text in texts if text not in path.read_text()]:
        assert time.monotonic() < deadline, f"{path.name} does not tell of {missing}"
        time.sleep(0.05)
