"""YAML as plain values with lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dstopology import source
from dstopology.source import Source
from dswire.errors import TopologyError


def read(directory: Path, text: str) -> Source:
    path = directory / "t.yaml"
    path.write_bytes(text.encode())
    return source.read(path)


def test_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "a: on\nb: 1:30\nc: [cpu:0, 5, 5.5, true, null, ~, 0x10, 010, 1e3, .5, '7', -3]\nd: 2024-01-01\ne:\n"
    assert read(tmp_path, text).document == {
        "a": "on",
        "b": "1:30",
        "c": ["cpu:0", 5, 5.5, True, None, None, 16, 10, 1000.0, 0.5, "7", -3],
        "d": "2024-01-01",
        "e": None,
    }


def test_every_value_has_its_line_and_a_mapping_that_of_its_key(tmp_path: Path) -> None:
    lines = read(tmp_path, "# remark\na:\n  b: 1\n  c:\n  - 2\n  - {d: 3}\n").problems
    keys = [("a",), ("a", "b"), ("a", "c"), ("a", "c", 0), ("a", "c", 1), ("a", "c", 1, "d")]
    assert [lines.line(key) for key in keys] == [2, 3, 4, 5, 6, 6]
    assert lines.line(("a", "b", "nothing", 7)) == 3
    assert lines.line(("nothing",)) == 2


def test_aliases_stand_for_what_they_name(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &x {n: [1]}\nb: *x\n").document == {"a": {"n": [1]}, "b": {"n": [1]}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2", ":2: top level: this is not YAML"),
        ("\ta: 1", ":1: top level: this is not YAML"),
        ("a: 1\n---\nb: 2", ":2: top level: this is not YAML"),
        ("a: *nobody", ":1: top level: this is not YAML"),
        ("", ":1: top level: the file is empty"),
        ("# only a remark\n", ":1: top level: the file is empty"),
        ("a: \x00", ":1: top level: this is not YAML text"),
        ("[" * 50_000, ":1: top level: the nesting is too deep"),
        ("a: &x [*x]", "20 levels"),
        ("[" * 30 + "]" * 30, "20 levels"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcde", "bcdef", strict=True)
        ), "more than 20000 values"),
        ("a: '" + "x" * (1 << 20) + "'", "more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(TopologyError) as caught:
        read(tmp_path, text)
    assert told in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 't.yaml'}:")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a: the key is given twice, first in line 1"),
        ("x: {a: 1,\n  a: 1}\n", ":2: x.a: the key is given twice, first in line 1"),
        ("? [1]\n: 2", ":1: top level: a key must be a word"),
        ("a: !!python/object:os.system x", "python/object:os.system' is not allowed"),
        ("a: !!python/object/apply:os.getpid []\n", "python/object/apply:os.getpid' is not allowed"),
        ("a: !!int q", "is not allowed"),
        ("a: !mine {b: 1}", "'!mine' is not allowed"),
    ],
)
def test_flaws_are_collected(tmp_path: Path, text: str, told: str) -> None:
    problems = read(tmp_path, text).problems
    with pytest.raises(TopologyError) as caught:
        problems.raise_any()
    assert told in caught.value.message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_bytes(b"a: \xff")
    with pytest.raises(TopologyError, match="not YAML text"):
        source.read(tmp_path / "t.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="cannot be read: No such file") as caught:
        source.read(tmp_path / "none.yaml")
    assert "DS_TOPOLOGY" in caught.value.remedy


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN.filter(lambda value: value is not None))
def test_what_yaml_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "t.yaml"
    path.write_text(yaml.safe_dump(value, allow_unicode=False))
    found = source.read(path)
    assert len(found.problems) == 0
    assert found.document == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("t") / "t.yaml"
    path.write_bytes(content)
    try:
        told = str(source.read(path).path)
    except TopologyError as error:
        told = error.message
    assert told.startswith(str(path))
