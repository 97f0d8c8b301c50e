"""Processes that die at given times, and perhaps come back: ``decode-0@12.5s+3s``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dstopology.resolved import Topology
from dswire.errors import BadInput

_FORM = re.compile(r"([A-Za-z0-9_.-]+)@([0-9]{1,9}(?:\.[0-9]{1,9})?)s?(?:\+([0-9]{1,9}(?:\.[0-9]{1,9})?)s?)?")
_REMEDY = "write NAME@SECONDS, or NAME@SECONDS+SECONDS for a process that comes back, as in decode-0@12.5s+3s"


@dataclass(frozen=True, slots=True)
class Failure:
    """A process dies without a word."""

    name: str
    #: from the beginning of the workload
    at_s: float
    #: until it is started again; None for never
    down_s: float | None


def parse(texts: Iterable[str], topology: Topology) -> tuple[Failure, ...]:
    """Failures as they are written on a command line, in order of time. Raises :class:`BadInput`."""
    made = sorted((_one(text, topology) for text in texts), key=lambda one: one.at_s)
    up_at: dict[str, float] = {}
    for one in made:
        if one.at_s < up_at.get(one.name, 0.0):
            raise BadInput(f"{one.name} cannot fail at {one.at_s:g} s: it is down then", remedy="let it fail later")
        up_at[one.name] = float("inf") if one.down_s is None else one.at_s + one.down_s
    return tuple(made)


def _one(text: str, topology: Topology) -> Failure:
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise BadInput(f"failure {text!r} is not understood", remedy=_REMEDY)
    name, at, down = found.groups()
    names = [*(one.name for one in topology.instances), *(one.name for one in topology.relays)]
    if name == topology.router.name:
        raise BadInput(f"failure {text!r}: the router is where a simulation looks from", remedy=_able(names))
    if name not in names:
        raise BadInput(f"failure {text!r}: the topology has no {name}", remedy=_able(names))
    return Failure(name, float(at), None if down is None else float(down))


def _able(names: list[str]) -> str:
    return f"name one of {', '.join(names)}"
