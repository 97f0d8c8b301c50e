"""Messages to bytes and back.

A frame is read twice before anything reaches a state machine: by ``msgpack`` under hard limits (it cannot make the
reader allocate much more than it is long), whose result is dropped, then by a typed reader into the struct that the
socket allows. Twice is far faster than to convert what the first has made: ``msgspec.convert`` looks at the types
anew each time.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from dswire.errors import ProtocolError

MessageT = TypeVar("MessageT")
ContainerT = TypeVar("ContainerT")

#: largest control frame, in bytes; a socket refuses larger ones before they are read
MAX_FRAME_NBYTES = 8 << 20
#: most elements in one array or map of a message
MAX_ITEMS = 1 << 20

#: longest byte string in a message: a ticket's token or secret
MAX_BIN_NBYTES = 64
#: most arrays and maps in one message: empty ones take a byte there and sixty here
MAX_CONTAINERS = 1 << 16
#: characters of a reader's complaint that are told; it may quote the message
MAX_TOLD_CHARS = 300

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One MessagePack map with a ``type``. Raises :class:`ProtocolError` above the frame limit."""
    frame = _encoder.encode(message)
    if len(frame) > MAX_FRAME_NBYTES:
        name = type(message).__name__
        raise ProtocolError(f"{name} takes {len(frame)} bytes, a frame may have {MAX_FRAME_NBYTES}")
    return frame


class Decoder(Generic[MessageT]):
    """Reads the messages of one union."""

    def __init__(self, union: Any) -> None:
        self._typed: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes | memoryview) -> MessageT:
        """The message in ``frame``. Raises :class:`ProtocolError` for anything else."""
        count = _Containers()
        try:
            msgpack.unpackb(
                frame,
                raw=False,
                strict_map_key=True,
                max_str_len=MAX_FRAME_NBYTES,
                max_bin_len=MAX_BIN_NBYTES,
                max_ext_len=0,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
                list_hook=count.one,
                object_hook=count.one,
            )
        except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
            told = f"{type(error).__name__} {_clip(error)}".strip()
            raise ProtocolError(f"the frame is not MessagePack within limits: {told}") from error
        try:
            return self._typed.decode(frame)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ProtocolError(f"the message does not fit the protocol: {_clip(error)}") from error


class _Containers:
    """Counts the arrays and maps of one message."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def one(self, container: ContainerT) -> ContainerT:
        """Let one pass. Raises ``ValueError`` above the limit."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_CONTAINERS} arrays and maps")
        return container


def _clip(error: Exception) -> str:
    told = str(error)
    return told if len(told) <= MAX_TOLD_CHARS else f"{told[:MAX_TOLD_CHARS]}... ({len(told)} characters)"
