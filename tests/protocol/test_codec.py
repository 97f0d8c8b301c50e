"""Whatever bytes come in: a message or a ProtocolError, nothing else, and never more memory than they take."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dswire.codec import MAX_CONTAINERS, MAX_FRAME_NBYTES, MAX_ITEMS, MAX_TOLD_CHARS, Decoder, encode
from dswire.errors import ProtocolError
from dswire.messages import client, kv, worker
from support.any_message import TEXT, any_message

UNIONS: dict[str, Any] = {
    "FromClient": client.FromClient,
    "FromWorker": worker.FromWorker,
    "FromKvWorker": kv.FromKvWorker,
    "ToFetcher": kv.ToFetcher,
}

KEYS = TEXT | st.sampled_from(["type", "request_id", "prompt", "sampling", "key", "handle", "tokens"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | TEXT
    | st.sampled_from(["Submit", "ClientHello", "WorkerHello", "KvOffer", "KvChunk"])
    | st.binary(max_size=4)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def decode(union: Any, frame: bytes) -> None:
    """A message that fits, or the one error."""
    try:
        message = Decoder[Any](union).decode(frame)
    except ProtocolError as error:
        if not error.message:
            raise AssertionError("an error must say what was wrong") from error
    else:
        frame = encode(message)
        assert encode(Decoder[Any](union).decode(frame)) == frame


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)
@settings(max_examples=150, deadline=None)
@given(frame=st.binary(max_size=64))
@example(frame=b"")
@example(frame=b"\xc1")
@example(frame=b"\x81\xa4type\xc0")
@example(frame=b"\xd6\xff\x00\x00\x00\x00")
@example(frame=b"\xc7\x00\xff")
def test_any_bytes(union: Any, frame: bytes) -> None:
    decode(union, frame)


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)
@settings(max_examples=150, deadline=None)
@given(value=VALUES)
def test_any_messagepack(union: Any, value: object) -> None:
    decode(union, msgpack.packb(value))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_real_message_with_bytes_changed(data: st.DataObject) -> None:
    frame = bytearray(encode(data.draw(any_message(client.Submit))))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(frame) - 1), st.integers(0, 255)), max_size=3)
    ):
        frame[place] = value
    decode(client.FromClient, bytes(frame))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_real_message_cut_short(data: st.DataObject) -> None:
    frame = encode(data.draw(any_message(client.Submit)))
    with pytest.raises(ProtocolError):
        Decoder[Any](client.FromClient).decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (b"\xdd" + struct.pack(">I", 2**32 - 1), "a list of four billion"),
        (b"\xdf" + struct.pack(">I", 2**32 - 1), "a map of four billion"),
        (b"\xdb" + struct.pack(">I", 2**32 - 1), "a string of four GiB"),
        (b"\xc6" + struct.pack(">I", 2**32 - 1), "four GiB of bytes"),
        (b"\xc9" + struct.pack(">I", 2**32 - 1) + b"\x05", "an extension of four GiB"),
        (b"\xdd" + struct.pack(">I", MAX_ITEMS + 1) + b"\x00" * (MAX_ITEMS + 1), "one item too many"),
        (b"\xdd" + struct.pack(">I", 1 << 19) + b"\x90" * (1 << 19), "half a million empty lists"),
        (b"\xdd" + struct.pack(">I", 1 << 19) + b"\x80" * (1 << 19), "half a million empty maps"),
        (b"\x91" * 100_000, "deeper than any stack"),
        (b"\x81\xa1a" * 50_000 + b"\x00", "maps deeper than any stack"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_frame_cannot_make_the_reader_allocate_more_than_it_is_long(frame: bytes, what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            Decoder[Any](client.FromClient).decode(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24, what
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        {"type": "x" * 1_000_000},
        {"type": "Submit", "request_id": "r", "prompt": "x", "sampling": {"x" * 1_000_000: 1}},
    ],
    ids=["type", "parameter"],
)
def test_a_complaint_does_not_quote_a_whole_message(value: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        Decoder[Any](client.FromClient).decode(msgpack.packb(value))
    assert len(caught.value.message) < 2 * MAX_TOLD_CHARS


def test_text_that_is_no_text_is_told_in_a_line() -> None:
    with pytest.raises(ProtocolError, match="can't decode byte 0xff in position 5") as caught:
        Decoder[Any](client.FromClient).decode(b"\xdb" + struct.pack(">I", 1_000) + b"12345" + b"\xff" * 995)
    assert len(caught.value.message) < 2 * MAX_TOLD_CHARS


def test_as_many_containers_as_allowed_are_read() -> None:
    chat = tuple(client.ChatMessage("user", "") for _ in range(MAX_CONTAINERS - 3))
    assert Decoder[Any](client.FromClient).decode(encode(client.Submit("r", chat=chat)))


def test_a_message_above_the_limit_is_not_written() -> None:
    with pytest.raises(ProtocolError, match=str(MAX_FRAME_NBYTES)):
        encode(client.Submit("r", prompt="x" * MAX_FRAME_NBYTES))


def test_the_longest_prompt_that_fits_a_frame_comes_through() -> None:
    message = client.Submit("r", prompt="x" * (MAX_FRAME_NBYTES - 64))
    assert Decoder[Any](client.FromClient).decode(encode(message)) == message


def test_unknown_sampling_parameters_are_refused_by_name() -> None:
    frame = msgpack.packb({"type": "Submit", "request_id": "r", "prompt": "x", "sampling": {"temprature": 1}})
    with pytest.raises(ProtocolError, match="temprature"):
        Decoder[Any](client.FromClient).decode(frame)


def test_a_wrong_type_is_refused_by_its_place() -> None:
    frame = msgpack.packb({"type": "Submit", "request_id": "r", "prompt_ids": [1, "two"]})
    with pytest.raises(ProtocolError, match=r"prompt_ids\[1\]"):
        Decoder[Any](client.FromClient).decode(frame)
