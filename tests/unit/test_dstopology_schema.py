"""Shapes and the published schema: one source, so they must agree on every document."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstopology.problems import Problems, did_you_mean, shown_key
from dstopology.schema import FILE, SIZE, File, json_schema, nbytes
from dstopology.shape import Number, Text, examine
from support.topologies import satisfies

SCHEMA = json_schema()
GOOD: dict[str, Any] = {
    "model": {"path": "m", "dtype": "bfloat16", "quantization": "int8", "max_model_len": 128},
    "slo": {"ttft_ms": 250, "tpot_ms": 60.5, "attainment": 0.9},
    "mode": "colocated",
    "nodes": [{"name": "n0", "host": "10.0.0.1", "bind_host": None, "devices": ["cpu:0", "cuda:12"]}],
    "router": {"node": "n0", "frontend": "tcp://*:5555", "backend": "ipc:///tmp/b", "retries": 0},
    "gateway": "127.0.0.1:8000",
    "prefill": {"replicas": 2, "tp": 1, "place": ["n0/cpu:0", ["n0/cuda:12"]], "kv": {"memory": "1.5 GiB"}},
    "decode": 3,
    "kv": {"block_size": 16, "blocks": None, "memory": 1 << 20},
    "relay": {"streams": 8, "transports": ["tcp"], "port": 7100},
    "security": {"curve": "on", "keys": "keys"},
    "force_transport": "tcp",
}
STRINGS = ["", "x", "n0", "auto", "1MiB", "tcp", "tcp://h:1", "cpu:0", "a\nb", "x" * 5000]
NUMBERS = [0, 1, -1, 70_000, 10**30, 0.5]
VALUES = st.sampled_from([None, True, *STRINGS, *NUMBERS, [], [1], ["shm"], {}, {"x": 1}]) | st.text(max_size=6)


def complaints(document: Any) -> int:
    problems = Problems("t.yaml")
    examine(FILE, document, (), problems)
    return len(problems)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside ``value``."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in pairs]
    for _, item in pairs:
        if isinstance(item, (dict, list)):
            found += places(item)
    return found


def test_a_full_document_is_accepted_by_both() -> None:
    assert complaints(GOOD) == 0
    assert satisfies(GOOD, SCHEMA, SCHEMA["$defs"])


@given(st.data())
def test_shapes_and_schema_agree_on_documents_with_a_changed_value(data: st.DataObject) -> None:
    document = json.loads(json.dumps(GOOD))
    container, key = data.draw(st.sampled_from(places(document)))
    if isinstance(container, dict) and data.draw(st.booleans()):
        container[data.draw(st.sampled_from(["nmae", "path", "node", "place"]))] = data.draw(VALUES)
    elif data.draw(st.booleans()):
        container[key] = data.draw(VALUES)
    else:
        del container[key]
    assert (complaints(document) == 0) == satisfies(document, SCHEMA, SCHEMA["$defs"])


def test_every_key_is_described() -> None:
    for section in SCHEMA["$defs"].values():
        assert section["description"]
        assert all(one["description"] for one in section["properties"].values())


def test_the_schema_names_its_draft_and_is_plain_json() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(SCHEMA))["$defs"]["RelaySection"]["properties"]["transports"]["default"] == [
        "shm",
        "cuda_ipc",
        "tcp",
        "gloo",
        "nccl",
    ]
    assert SCHEMA["$defs"]["File"]["required"] == ["model"]


def test_defaults_fit_their_own_shapes() -> None:
    import dataclasses

    for field in dataclasses.fields(File):
        if isinstance(field.default, str):
            assert complaints({"model": "m", field.name: field.default}) == 0


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (7, 7),
        ("7B", 7),
        ("1KiB", 1024),
        ("1.5 KiB", 1536),
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("100 kB", 10**5),
    ],
)
def test_sizes(written: int | str, wanted: int) -> None:
    problems = Problems("t.yaml")
    examine(SIZE, written, (), problems)
    assert len(problems) == 0
    assert nbytes(written) == wanted


@pytest.mark.parametrize("written", ["512", "512 mib", "-1MiB", "MiB", "1e3KiB", "1KiB\n", 0, -1, 1.5, True, None])
def test_what_is_no_size(written: Any) -> None:
    problems = Problems("t.yaml")
    examine(SIZE, written, (), problems)
    assert len(problems) == 1


def test_messages_name_value_and_remedy() -> None:
    problems = Problems("t.yaml")
    examine(Number(1, 5), "x", ("a",), problems)
    examine(Number(1, 5), 7, ("b", 0), problems)
    examine(Text("a word", "[a-z]+"), "A" * 100, ("c",), problems)
    examine(Text("a word"), {}, ("d",), problems)
    examine(Text("a word"), None, ("e",), problems)
    error = problems.error()
    assert error.message.splitlines() == [
        "t.yaml:1: a: a whole number is wanted, not 'x'",
        "    write a whole number from 1 to 5",
        "t.yaml:1: b[0]: 7 is out of range",
        "    write a whole number from 1 to 5",
        f"t.yaml:1: c: '{'A' * 56}... is not a word",
        "    write a word",
        "t.yaml:1: d: a word is wanted, not a mapping",
        "    write a word",
        "t.yaml:1: e: the value is missing",
        "    leave the key out, or write a word",
    ]


def test_keys_are_shown_as_paths() -> None:
    assert shown_key(("prefill", "place", 0, 1)) == "prefill.place[0][1]"
    assert shown_key(()) == "top level"


def test_suggestions() -> None:
    assert did_you_mean("replica", ["tp", "replicas"]) == "did you mean 'replicas'?"
    assert did_you_mean("zzz", ["tp", "pp"]) == "use one of tp, pp"
