"""What the machine allows: a plain copy, a plain socket, libsodium's box. No code of ours is in what is timed."""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import threading
import time
from pathlib import Path

import zmq

from dskv.segment import Segment

_KEY_NBYTES = 32
_NONCE_NBYTES = 24
_TAG_NBYTES = 16
#: bytes that one call of a plain socket copy is given
_PIECE_NBYTES = 1 << 20


def address(segment: Segment) -> int:
    """Where a writable mapping begins in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(segment.buffer))


def memcpy_s(target: int, source: int, nbytes: int) -> float:
    """Seconds of one ``memcpy``."""
    began = time.perf_counter()
    ctypes.memmove(target, source, nbytes)
    return time.perf_counter() - began


def socket_s(target: memoryview, source: memoryview) -> float:
    """Seconds to send ``source`` over a blocking TCP connection of the loopback into ``target``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        for end in (sender, receiver):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=_send_all, args=(sender, source))
        began = time.perf_counter()
        thread.start()
        taken = 0
        while taken < len(source):
            taken += receiver.recv_into(target[taken : taken + _PIECE_NBYTES])
        seconds = time.perf_counter() - began
        thread.join()
    return seconds


def _send_all(sender: socket.socket, source: memoryview) -> None:
    for start in range(0, len(source), _PIECE_NBYTES):
        sender.sendall(source[start : start + _PIECE_NBYTES])


class Box:
    """libsodium's ``crypto_box`` with a key agreed on, which is what CURVE does to each frame."""

    def __init__(self, library: ctypes.CDLL, frame_nbytes: int) -> None:
        self._library = library
        self._frame_nbytes = frame_nbytes
        self._out = ctypes.create_string_buffer(frame_nbytes + _TAG_NBYTES)
        self._nonce = bytes(_NONCE_NBYTES)
        self._key = bytes(_KEY_NBYTES)

    def seconds(self, source: int, nbytes: int) -> float:
        """To encrypt ``nbytes`` from ``source`` on in frames, in one thread."""
        began = time.perf_counter()
        for start in range(0, nbytes, self._frame_nbytes):
            size = ctypes.c_ulonglong(min(self._frame_nbytes, nbytes - start))
            frame = ctypes.c_void_p(source + start)
            self._library.crypto_box_easy_afternm(self._out, frame, size, self._nonce, self._key)
        return time.perf_counter() - began


def box(frame_nbytes: int) -> Box | None:
    """The box of the libsodium that pyzmq brings, else of the system's; None where there is neither."""
    bundled = sorted(Path(zmq.__file__).parent.parent.glob("pyzmq.libs/libsodium*"))
    name = str(bundled[0]) if bundled else ctypes.util.find_library("sodium")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.sodium_init()
    return Box(library, frame_nbytes)
