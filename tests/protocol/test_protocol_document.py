"""``docs/protocol.md`` tells the public protocol as it is: messages, fields, types, defaults, examples, codes."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from msgspec import inspect

from dswire.codec import MAX_FRAME_NBYTES, MAX_ITEMS, Decoder, encode
from dswire.errors import DsError, ErrorInfo
from dswire.messages import PROTOCOL, client
from support.error_tree import leaves

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

FROM_CLIENT = get_args(client.FromClient)
TO_CLIENT = get_args(client.ToClient)
PARTS = (
    client.Sampling,
    client.ChatMessage,
    client.TokenLogprob,
    client.Usage,
    client.Ledger,
    client.WorkerStatus,
    ErrorInfo,
)


def chapter(title: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## .*$", DOCUMENT.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.M)[0]


def sections(text: str) -> dict[str, str]:
    """What stands under each heading of the third level."""
    parts = re.split(r"^### (\w+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


SECTIONS = sections(chapter("Messages from the client")) | sections(chapter("Messages from the router"))
SECTIONS |= sections(chapter("Parts of messages"))


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def told(kind: inspect.Type) -> str:
    """How the document writes a type."""
    match kind:
        case inspect.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case inspect.UnionType(types=types):
            return " or ".join(map(told, types))
        case inspect.VarTupleType(item_type=item):
            return f"list of {told(item)}"
        case inspect.TupleType(item_types=items):
            return f"[{', '.join(map(told, items))}]"
        case inspect.DictType(key_type=key, value_type=value):
            return f"map of {told(key)} to {told(value)}"
    plain = {
        "StrType": "string",
        "IntType": "integer",
        "FloatType": "float",
        "BoolType": "boolean",
        "NoneType": "nil",
    }
    return plain[type(kind).__name__]


def default(field: inspect.Field) -> str:
    """How the document writes a default."""
    if field.required:
        return ""
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    text = "nil" if value is None else json.dumps(msgspec.to_builtins(value))
    return f"`{text}`"


@pytest.mark.parametrize("struct", [*FROM_CLIENT, *TO_CLIENT, *PARTS], ids=lambda one: one.__name__)
def test_every_field_with_type_and_default(struct: type[msgspec.Struct]) -> None:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    expected = [[f"`{field.encode_name}`", told(field.type), default(field)] for field in info.fields]
    found = rows(SECTIONS[struct.__name__])
    assert [row[:3] for row in found] == expected
    assert all(len(row) == 4 and row[3] for row in found), "every field has a meaning"


def test_messages_stand_under_their_sender_and_nothing_else_is_told() -> None:
    assert list(sections(chapter("Messages from the client"))) == [one.__name__ for one in FROM_CLIENT]
    assert list(sections(chapter("Messages from the router"))) == [one.__name__ for one in TO_CLIENT]
    assert list(sections(chapter("Parts of messages"))) == [one.__name__ for one in PARTS]


@pytest.mark.parametrize("struct", [*FROM_CLIENT, *TO_CLIENT], ids=lambda one: one.__name__)
def test_examples_are_what_is_sent(struct: type[msgspec.Struct]) -> None:
    union: Any = client.FromClient if struct in FROM_CLIENT else client.ToClient
    examples = re.findall(r"```json\n(.*?)\n```\n```hex\n(.*?)\n```", SECTIONS[struct.__name__], flags=re.S)
    assert examples
    for shown, hexadecimal in examples:
        frame = bytes.fromhex(hexadecimal)
        assert msgpack.unpackb(frame) == json.loads(shown)
        message = Decoder[msgspec.Struct](union).decode(frame)
        assert type(message) is struct
        assert encode(message) == frame


def test_every_error_code() -> None:
    expected = [[f"`{one.code}`", str(one.http_status), "yes" if one.retryable else ""] for one in leaves(DsError)]
    assert [row[:3] for row in rows(chapter("Errors"))] == expected


def test_version_and_limits_are_the_codes() -> None:
    from dsrouter import checks

    assert f"version **{PROTOCOL}**" in DOCUMENT
    limits = dict(row for row in rows(chapter("Limits")))
    assert f"{MAX_FRAME_NBYTES >> 20} MiB" in limits["frame"]
    assert limits["items of one list or map"] == f"{MAX_ITEMS:,}"
    assert limits["`n`"] == f"1 to {checks.MAX_CHOICES}"
    assert limits["`stop`"] == f"{checks.MAX_STOPS} strings of 1 to {checks.MAX_STOP_CHARS} characters"
    assert limits["`stop_token_ids`"] == str(checks.MAX_STOP_TOKENS)
    assert limits["`logprobs`"] == f"0 to {checks.MAX_LOGPROBS}"


def test_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in headings_of(DOCUMENT)}
    assert set(re.findall(r"\]\(#([^)]+)\)", DOCUMENT)) <= headings


def headings_of(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", text, flags=re.M)


def test_the_conversation_shown_numbers_events_without_a_gap() -> None:
    numbers = [int(one) for one in re.findall(r"r1 number (\d+)", chapter("A conversation"))]
    assert numbers[0] == 0
    assert all(after == before + 1 for before, after in pairwise(numbers))
