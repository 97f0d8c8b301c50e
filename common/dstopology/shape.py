"""What a value of the file may look like: checks it, builds it, and describes it as JSON Schema.

A section is a dataclass whose fields are made by :func:`key`; its shape is :class:`Mapping`. Checking goes on
after a problem, so that one run tells all of them; what it returns counts only when it added no problem.

msgspec's own constraints (``msgspec.Meta``) are not used: with them Python 3.11 crashes in its garbage collector
(https://github.com/msgspec/msgspec/issues/717).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Protocol

from dstopology.problems import Key, Problems, did_you_mean, nearest

Json = dict[str, Any]

#: characters of a string
MAX_TEXT = 4096


class Shape(Protocol):
    """The shape of one value."""

    @property
    def wanted(self) -> str:
        """How a message names what should stand there."""

    @property
    def advice(self) -> str:
        """What to write there, in full."""

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is of the right kind at all; its range is left to :meth:`check`."""

    def check(self, value: Any, at: Key, problems: Problems) -> Any:
        """The value as the program wants it. Called only when it :meth:`fits`; tells what else is wrong."""

    def schema(self, definitions: Json) -> Json:
        """JSON Schema of the value; schemas of mappings are put into ``definitions``."""


def _kind(value: Any) -> str:
    """A wrong value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def examine(shape: Shape, value: Any, at: Key, problems: Problems) -> Any:
    """Check ``value``, its kind first. Returns None after a problem with its kind."""
    if shape.fits(value):
        return shape.check(value, at, problems)
    if value is None:
        problems.add(at, "the value is missing", f"leave the key out, or write {shape.advice}")
    else:
        problems.add(at, f"{shape.wanted} is wanted, not {_kind(value)}", f"write {shape.advice}")
    return None


@dataclass(frozen=True, slots=True)
class Text:
    """A string."""

    wanted: str = "a text"
    #: the whole string must match
    pattern: str = ".+"

    @property
    def advice(self) -> str:
        return self.wanted

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= MAX_TEXT

    def check(self, value: Any, at: Key, problems: Problems) -> str:
        text = str(value)
        if not re.fullmatch(self.pattern, text):
            problems.add(at, f"{_kind(text)} is not {self.wanted}", f"write {self.wanted}")
        return text

    def schema(self, definitions: Json) -> Json:
        return {"type": "string", "pattern": f"^({self.pattern})$", "maxLength": MAX_TEXT}


@dataclass(frozen=True, slots=True)
class Number:
    """A number between ``least`` and ``most``, both allowed."""

    least: float
    most: float
    whole: bool = True

    @property
    def wanted(self) -> str:
        return "a whole number" if self.whole else "a number"

    @property
    def advice(self) -> str:
        return f"{self.wanted} from {self.least} to {self.most}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)

    def check(self, value: Any, at: Key, problems: Problems) -> float:
        if not self.least <= value <= self.most:
            problems.add(at, f"{value} is out of range", f"write {self.advice}")
            return self.least
        return int(value) if self.whole else float(value)

    def schema(self, definitions: Json) -> Json:
        return {
            "type": "integer" if self.whole else "number",
            "minimum": self.least,
            "maximum": self.most,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.words)}"

    @property
    def advice(self) -> str:
        return self.wanted

    def fits(self, value: Any) -> bool:
        return isinstance(value, str)

    def check(self, value: Any, at: Key, problems: Problems) -> str:
        if value not in self.words:
            problems.add(at, f"{_kind(value)} is not {self.wanted}", did_you_mean(value, self.words))
        return str(value)

    def schema(self, definitions: Json) -> Json:
        return {"enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Flag:
    """``true`` or ``false``."""

    wanted = advice = "true or false"

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool)

    def check(self, value: Any, at: Key, problems: Problems) -> bool:
        if not self.fits(value):
            problems.add(at, f"{_kind(value)} is not {self.wanted}", f"write {self.wanted}")
        return value is True

    def schema(self, definitions: Json) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Many:
    """A list, which may not be empty."""

    item: Shape
    wanted: str
    may_be_empty: bool = False

    @property
    def advice(self) -> str:
        return self.wanted

    def fits(self, value: Any) -> bool:
        return isinstance(value, list)

    def check(self, value: Any, at: Key, problems: Problems) -> tuple[Any, ...]:
        if not value and not self.may_be_empty:
            problems.add(at, "the list is empty", f"write {self.wanted}, or leave the key out")
        return tuple(examine(self.item, item, (*at, index), problems) for index, item in enumerate(value))

    def schema(self, definitions: Json) -> Json:
        return {
            "type": "array",
            "items": self.item.schema(definitions),
            "minItems": 0 if self.may_be_empty else 1,
        }


@dataclass(frozen=True, slots=True)
class Either:
    """A value of any of several kinds: a section and its short forms."""

    shapes: tuple[Shape, ...]

    @property
    def wanted(self) -> str:
        return " or ".join(shape.wanted for shape in self.shapes)

    @property
    def advice(self) -> str:
        return " or ".join(shape.advice for shape in self.shapes)

    def fits(self, value: Any) -> bool:
        return any(shape.fits(value) for shape in self.shapes)

    def check(self, value: Any, at: Key, problems: Problems) -> Any:
        return next(shape for shape in self.shapes if shape.fits(value)).check(value, at, problems)

    def schema(self, definitions: Json) -> Json:
        return {"anyOf": [shape.schema(definitions) for shape in self.shapes]}


def key(shape: Shape, about: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a section. Without a default it must be given; where the default is None, null may stand."""
    metadata = {"shape": shape, "about": about}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A section, built as the dataclass ``section``."""

    section: type[Any]

    @property
    def wanted(self) -> str:
        return "a mapping"

    @property
    def advice(self) -> str:
        return f"a mapping with any of the keys {', '.join(self._fields())}"

    def _fields(self) -> dict[str, dataclasses.Field[Any]]:
        return {field.name: field for field in dataclasses.fields(self.section)}

    def fits(self, value: Any) -> bool:
        return isinstance(value, dict)

    def _meant(self, name: str, value: dict[str, Any]) -> str:
        """Which key ``name`` may mean: one that must be given and is not, before all others."""
        fields = self._fields()
        missing = [key for key, one in fields.items() if one.default is dataclasses.MISSING and key not in value]
        return nearest(name, missing) or did_you_mean(name, fields)

    def check(self, value: Any, at: Key, problems: Problems) -> Any:
        fields = self._fields()
        found: dict[str, Any] = {}
        for name, item in value.items():
            field = fields.get(name)
            if field is None:
                problems.add((*at, name), "there is no such key", self._meant(name, value))
            elif item is None and field.default is None:
                found[name] = None
            else:
                found[name] = examine(field.metadata["shape"], item, (*at, name), problems)
        for name, field in fields.items():
            if name not in found and field.default is dataclasses.MISSING:
                about = field.metadata["about"]
                problems.add((*at, name), "the key is missing", f"add it: {about}")
                found[name] = None
        return self.section(**found)

    def schema(self, definitions: Json) -> Json:
        name = self.section.__name__
        if name not in definitions:
            definitions[name] = {}
            fields = self._fields()
            definitions[name] = {
                "description": str(self.section.__doc__),
                "type": "object",
                "properties": {one: _property(field, definitions) for one, field in fields.items()},
                "required": [n for n, field in fields.items() if field.default is dataclasses.MISSING],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}


def _property(field: dataclasses.Field[Any], definitions: Json) -> Json:
    schema = field.metadata["shape"].schema(definitions)
    if field.default is None:
        schema = {"anyOf": [schema, {"type": "null"}]}
    described = {"description": field.metadata["about"], **schema}
    plain = isinstance(field.default, (str, int, float, tuple)) or field.default is None
    return {**described, "default": field.default} if plain else described
