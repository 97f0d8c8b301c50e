"""Topology files and models for tests."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstopology.load import load
from dstopology.resolved import Topology
from dswire.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Desk:
    """A directory with an environment of its own."""

    directory: Path

    @property
    def env(self) -> dict[str, str]:
        """No model, no file of the user's is found with it."""
        return {
            "DS_HOME": str(self.directory / "home"),
            "DS_SHM_DIR": str(self.directory),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
        }

    def write(self, text: str) -> Path:
        """The topology file with that text."""
        path = self.directory / "t.yaml"
        path.write_text(text)
        return path

    def load(self, text: str, **env: str) -> Topology:
        """What the text resolves to."""
        return load(self.write(text), self.env | env)

    def problems(self, text: str, **env: str) -> list[str]:
        """``line: key: reason`` of all that is wrong with the text."""
        error = self.error(text, **env)
        if error is None:
            return []
        lines = [line for line in error.message.splitlines() if not line.startswith("    ")]
        prefix = f"{self.directory / 't.yaml'}:"
        assert error.remedy
        assert all(line.startswith(prefix) for line in lines)
        return [line.removeprefix(prefix) for line in lines]

    def error(self, text: str, **env: str) -> TopologyError | None:
        """The error that the text makes."""
        try:
            self.load(text, **env)
        except TopologyError as error:
            return error
        return None

    def model(self, name: str = "tiny", *, files_nbytes: int = 4096, **config: Any) -> None:
        """Put a model of that shape into ``DS_HOME``."""
        shape = {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "max_position_embeddings": 2048,
            "dtype": "float32",
        }
        directory = self.directory / "home" / "models" / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(shape | config))
        with (directory / "model.safetensors").open("wb") as file:
            file.truncate(files_nbytes)


def satisfies(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Whether ``value`` satisfies a JSON Schema of the few words that ours uses; others raise AssertionError."""
    known = {
        *("description", "default", "title", "$schema", "$defs"),
        *("$ref", "anyOf", "enum", "type", "pattern", "maxLength", "minimum", "maximum"),
        *("items", "minItems", "properties", "required", "additionalProperties"),
    }
    assert set(schema) <= known
    if "$ref" in schema:
        return satisfies(value, definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    if "anyOf" in schema:
        return any(satisfies(value, one, definitions) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        return isinstance(value, dict) and _object(value, schema, definitions)
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) >= schema["minItems"]
            and all(satisfies(item, schema["items"], definitions) for item in value)
        )
    return _scalar(value, kind, schema)


def _object(value: dict[str, Any], schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    properties = schema["properties"]
    assert schema["additionalProperties"] is False
    return set(schema["required"]) <= set(value) <= set(properties) and all(
        satisfies(item, properties[name], definitions) for name, item in value.items()
    )


def _scalar(value: Any, kind: str, schema: dict[str, Any]) -> bool:
    if kind == "null":
        return value is None
    if kind == "string":
        pattern = schema["pattern"].removeprefix("^").removesuffix("$")
        return isinstance(value, str) and len(value) <= schema["maxLength"] and bool(re.fullmatch(pattern, value))
    numbers = {"integer": (int,), "number": (int, float)}[kind]
    return (
        isinstance(value, numbers)
        and not isinstance(value, bool)
        and bool(schema["minimum"] <= value <= schema["maximum"])
    )
