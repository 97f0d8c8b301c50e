"""What processes hold of a host: memory of their own, open files, threads. Linux only, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of a process and of those that it started."""

    #: resident or swapped; files and what is shared, such as KV pools, are no part of it
    private_nbytes: int = 0
    files: int = 0
    threads: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.private_nbytes + other.private_nbytes, self.files + other.files, self.threads + other.threads
        )


def footprint(pid: int) -> Footprint:
    """Of ``pid`` and all processes below it; nothing of those that end meanwhile."""
    return sum(map(_own, (pid, *_below(pid))), Footprint())


def _own(pid: int) -> Footprint:
    try:
        status = (_PROC / str(pid) / "status").read_text()
        files = len(os.listdir(_PROC / str(pid) / "fd"))
    except OSError:
        return Footprint()
    told = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    own = sum(int(told[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap") if name in told)
    return Footprint(own, files, int(told["Threads"]))


def _below(pid: int) -> Iterator[int]:
    children = defaultdict(list)
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            # behind the name, which may hold anything: state, then the parent
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children[parent].append(int(path.parent.name))
    found = [pid]
    while found:
        here = children[found.pop()]
        yield from here
        found += here
