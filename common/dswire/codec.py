"""Messages to bytes and back.

Decoding takes two steps, both before anything reaches a state machine: ``msgpack`` under hard limits (a frame
cannot make the reader allocate more than it is long), then a type check into the struct that the socket allows.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from dswire.errors import ProtocolError

MessageT = TypeVar("MessageT")

#: largest control frame, in bytes; a socket refuses larger ones before they are read
MAX_FRAME_NBYTES = 8 << 20
#: most elements in one array or map of a message
MAX_ITEMS = 1 << 20

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
        self._union = union

    def decode(self, frame: bytes | memoryview) -> MessageT:
        """The message in ``frame``. Raises :class:`ProtocolError` for anything else."""
        try:
            raw = msgpack.unpackb(
                frame,
                raw=False,
                strict_map_key=True,
                max_str_len=MAX_FRAME_NBYTES,
                max_bin_len=0,
                max_ext_len=0,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
            )
        except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
            raise ProtocolError(f"the frame is not MessagePack within limits: {error!r}") from error
        try:
            message: MessageT = msgspec.convert(raw, self._union)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the message does not fit the protocol: {error}") from error
        return message
