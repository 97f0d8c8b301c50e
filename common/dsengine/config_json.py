"""``config.json`` of a Hugging Face directory, read key by key.

Invariant: a value that comes out has the type that was asked for; a damaged file, a missing key or a value of
another type is :class:`ModelNotFound` that names file and key. ``null`` counts as absent. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dswire.errors import ModelNotFound

T = TypeVar("T")

_DAMAGED = "the file is damaged: fetch the model again"


class ConfigFile:
    """The configuration of one model."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self._raw = raw

    @classmethod
    def load(cls, model_dir: Path) -> ConfigFile:
        """Read ``config.json`` of ``model_dir``."""
        path = model_dir / "config.json"
        if not path.is_file():
            raise ModelNotFound(
                f"{model_dir}: there is no config.json",
                remedy="point model.path at a Hugging Face directory, or fetch one with `dsctl model pull`",
            )
        return cls(path, _decode(path))

    @property
    def architecture(self) -> str:
        """The class that the model was saved from; ``unnamed`` where the file does not say."""
        names = self.get("architectures", list[str]) or ["unnamed"]
        return names[0]

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``, None where absent."""
        value = self._raw.get(key)
        if value is None:
            return None
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ModelNotFound(f"{self.path}: {key}: {error}", remedy=_DAMAGED) from error

    def need(self, key: str, kind: type[T]) -> T:
        """The value of ``key``, which must be there."""
        value = self.get(key, kind)
        if value is None:
            raise ModelNotFound(f"{self.path}: {key} is missing", remedy=_DAMAGED)
        return value

    def integer(self, key: str, default: int) -> int:
        """``key``, or ``default`` where absent."""
        value = self.get(key, int)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """``key``, or ``default`` where absent."""
        value = self.get(key, float)
        return default if value is None else value

    def flag(self, key: str, default: bool) -> bool:
        """``key``, or ``default`` where absent."""
        value = self.get(key, bool)
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        """``key``, or ``default`` where absent."""
        return self.get(key, str) or default

    def has(self, key: str) -> bool:
        """Whether ``key`` is written down, ``null`` included."""
        return key in self._raw

    def nullable(self, key: str, default: T) -> T | None:
        """``key``, None where it is ``null``, ``default`` where it is not written down."""
        return self.get(key, type(default)) if key in self._raw else default

    def eos_ids(self) -> frozenset[int]:
        """As transformers' ``generate``: the generation configuration's tokens go before the model's."""
        path = self.path.with_name("generation_config.json")
        generation = ConfigFile(path, _decode(path) if path.is_file() else {})
        for source in (generation, self):
            if isinstance(source._raw.get("eos_token_id"), list):
                return frozenset(source.need("eos_token_id", list[int]))
            eos = source.get("eos_token_id", int)
            if eos is not None:
                return frozenset((eos,))
        return frozenset()


def _decode(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ModelNotFound(f"{path}: {error}", remedy=_DAMAGED) from error
