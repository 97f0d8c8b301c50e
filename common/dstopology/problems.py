"""What is wrong with a topology file, collected so that one run tells everything.

Invariant: problems are told in the order of their lines, each as ``file:line: key.path: reason``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from dswire.errors import TopologyError

#: where a value stands in the document: mapping keys and list positions from the top
Key = tuple[str | int, ...]


def shown_key(key: Key) -> str:
    """``("prefill", "place", 0, 1)`` as ``prefill.place[0][1]``."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text or "top level"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest of ``known``; when none is near, all of them."""
    names = list(known)
    return nearest(word, names) or f"use one of {', '.join(names)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest of ``known``; empty when none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    line: int
    key: Key
    reason: str
    remedy: str


class Problems:
    """Collects the problems of one file."""

    def __init__(self, file: str) -> None:
        #: the file as the user named it
        self.file = file
        #: line of each value, counted from 1
        self.lines: dict[Key, int] = {}
        self._found: list[Problem] = []

    def __len__(self) -> int:
        return len(self._found)

    def line(self, key: Key) -> int:
        """Line of ``key``, or of the nearest part of the document around it."""
        while key not in self.lines and key:
            key = key[:-1]
        return self.lines.get(key, 1)

    def add(self, key: Key, reason: str, remedy: str) -> None:
        """Note a problem at ``key``."""
        self._found.append(Problem(self.line(key), key, reason, remedy))

    def add_at(self, line: int, key: Key, reason: str, remedy: str) -> None:
        """Note a problem at a line that holds no value of its own."""
        self._found.append(Problem(line, key, reason, remedy))

    def error(self) -> TopologyError:
        """All problems as one error."""
        found = sorted(self._found, key=lambda problem: problem.line)
        lines = [f"{self.file}:{one.line}: {shown_key(one.key)}: {one.reason}" for one in found]
        if len(found) == 1:
            return TopologyError(lines[0], remedy=found[0].remedy)
        told = [f"{line}\n    {one.remedy}" for line, one in zip(lines, found, strict=True)]
        return TopologyError("\n".join(told), remedy=f"correct these {len(found)} places")

    def raise_any(self) -> None:
        """Raise :class:`TopologyError` when there is any problem."""
        if self._found:
            raise self.error()
