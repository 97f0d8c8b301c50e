"""Values of config.json by their types, or an error that names file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsengine.config_json import ConfigFile
from dswire.errors import ModelNotFound


def write(path: Path, **values: Any) -> ConfigFile:
    (path / "config.json").write_bytes(msgspec.json.encode(values))
    return ConfigFile.load(path)


def test_null_is_absent_unless_asked_for(tmp_path: Path) -> None:
    config = write(tmp_path, a=None, b=0)
    assert config.get("a", int) is None
    assert (config.integer("a", 7), config.integer("b", 7), config.integer("c", 7)) == (7, 0, 7)
    assert (config.nullable("a", 7), config.nullable("b", 7), config.nullable("c", 7)) == (None, 0, 7)
    assert (config.has("a"), config.has("c")) == (True, False)


def test_types(tmp_path: Path) -> None:
    config = write(tmp_path, i=3, f=0.5, t="gelu", b=False, layers=[1, 0])
    assert (config.number("i", 1.0), config.number("f", 1.0)) == (3.0, 0.5)
    assert (config.text("t", ""), config.flag("b", True)) == ("gelu", False)
    assert config.need("layers", list[int]) == [1, 0]


@pytest.mark.parametrize("key", ["hidden_size", "nothing"])
def test_what_is_missing_or_of_another_type_is_named(tmp_path: Path, key: str) -> None:
    config = write(tmp_path, hidden_size="wide")
    with pytest.raises(ModelNotFound, match=rf"config\.json: {key}") as caught:
        config.need(key, int)
    assert "fetch the model again" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\x00", b'{"a": '])
def test_what_is_no_object_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        ConfigFile.load(tmp_path)


def test_the_first_architecture_counts(tmp_path: Path) -> None:
    assert write(tmp_path, architectures=["A", "B"]).architecture == "A"
    assert write(tmp_path, architectures=[]).architecture == "unnamed"
