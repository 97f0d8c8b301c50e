"""A YAML file as plain values, with the line of each.

Scalars follow the YAML 1.2 core schema: ``on``, ``no`` and ``1:30`` are strings, not booleans or minutes. Only
plain values come out: no tag of any kind makes an object. Limits hold before anything is built: the size of the
file, and the number of values (aliases can multiply them).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dstopology.problems import Key, Problems
from dswire.errors import TopologyError

MAX_FILE_NBYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]{1,30}|0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")


class _CoreLoader(yaml.SafeLoader):
    """Composes nodes with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way to say which scalars are resolved)


for _name, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern.pattern})$"), None)


def _to_int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_COLLECTIONS = (_TAG + "map", _TAG + "seq")
#: tag of a scalar -> (what its text must look like, how it becomes a value)
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + "str": (re.compile(r".*", re.DOTALL), str),
    _TAG + "int": (_INT, _to_int),
    _TAG + "float": (_FLOAT, float),
    _TAG + "bool": (_BOOL, lambda text: text.lower() == "true"),
    _TAG + "null": (_NULL, lambda _: None),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A file that could be parsed."""

    path: Path
    content: bytes
    #: mappings, lists and scalars
    document: Any
    #: knows the lines; holds what reading found, such as a key given twice
    problems: Problems


def read(path: Path | str) -> Source:
    """Parse the file. Raises :class:`TopologyError` when it cannot be read or is no YAML."""
    problems = Problems(str(path))
    content = _bytes(Path(path), problems)
    node = _compose(content, problems)
    builder = _Builder(problems)
    document = builder.value(node, ()) if node is not None else None
    if document is None:
        problems.add((), "the file is empty", "the least that it may hold is `model: smollm2-135m-instruct`")
        raise problems.error()
    return Source(Path(path).resolve(), content, document, problems)


def _bytes(path: Path, problems: Problems) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise TopologyError(
            f"{path}: cannot be read: {error.strerror}",
            remedy="name the topology with -f, or set DS_TOPOLOGY",
        ) from error
    if len(content) > MAX_FILE_NBYTES:
        problems.add((), f"the file has more than {MAX_FILE_NBYTES} bytes", "is it really a topology?")
        raise problems.error()
    return content


def _compose(content: bytes, problems: Problems) -> yaml.Node | None:
    try:
        # composed, never constructed: no tag can make an object
        node: yaml.Node | None = yaml.compose(content.decode(), Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        reason = f"this is not YAML: {error.problem}{context}"
        problems.add_at(mark.line + 1 if mark else 1, (), reason, "mind the indentation, quotes and brackets")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.add((), f"this is not YAML text: {error}".replace("\n", " "), "save it as UTF-8 text")
    except RecursionError:
        problems.add((), "the nesting is too deep", "a topology needs no more than five levels")
    else:
        return node
    raise problems.error()


class _Builder:
    """Turns nodes into plain values and notes their lines."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._values = 0

    def value(self, node: yaml.Node, key: Key, line: int | None = None) -> Any:
        """The plain value of ``node``; ``line`` overrides the node's own (a mapping's begins at its key)."""
        self._problems.lines[key] = line or node.start_mark.line + 1
        self._values += 1
        if self._values > MAX_VALUES or len(key) > MAX_DEPTH:
            reason = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels"
            self._problems.add(key[:MAX_DEPTH], reason, "check the aliases: they may repeat themselves")
            raise self._problems.error()
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            self._refuse_tag(node, key)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                self._problems.add_at(line, key, "a key must be a word", "write `name: value`")
                continue
            name = name_node.value
            if name in found:
                first = self._problems.line((*key, name))
                reason = f"the key is given twice, first in line {first}"
                self._problems.add_at(line, (*key, name), reason, "keep one of the two")
                continue
            found[name] = self.value(value_node, (*key, name), line)
        return found

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        pattern, convert = _SCALARS.get(node.tag, (None, str))
        if pattern is None or not pattern.fullmatch(node.value):
            self._refuse_tag(node, key)
            return node.value
        return convert(node.value)

    def _refuse_tag(self, node: yaml.Node, key: Key) -> None:
        self._problems.add(key, f"the tag {node.tag!r} is not allowed here", "write the plain value")
