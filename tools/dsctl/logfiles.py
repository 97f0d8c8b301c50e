"""The log files of a run as one stream of entries, in time order.

A line that is no JSON (the output of a crash, of a native library) belongs to the time of the line before it in
its file. Invariant: nothing of a file is shown twice or left out, and lines of one time keep their order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

_CHUNK_NBYTES = 1 << 16
#: pause between two looks for new lines. A log viewer may look four times a second: nobody's request waits for it,
#: and the standard library has no way to wait for files to grow
LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    #: seconds since 1970
    time: float
    process: str
    #: "" for a line that is no JSON
    level: str
    #: the event, or the line as it is
    text: str
    #: the event's other fields
    fields: dict[str, Any]
    #: the line
    raw: str


class LogFile:
    """One process's log, read from the end and then as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = path.stem
        self._offset = 0
        self._inode = -1
        self._rest = b""
        self._time = 0.0

    def tail(self, lines: int) -> list[Entry]:
        """The last ``lines`` lines; :meth:`more` goes on from there."""
        with self.path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            end = self._offset = file.seek(0, 2)
            data = b""
            while end > 0 and data.count(b"\n") <= lines:
                start = max(0, end - _CHUNK_NBYTES)
                file.seek(start)
                data = file.read(end - start) + data
                end = start
        *whole, self._rest = data.split(b"\n")
        return self._entries(whole[-lines:] if lines else [])

    def more(self) -> list[Entry]:
        """Whole lines that came since; from the beginning when the file was set aside for a new one."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return []
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset, self._rest = status.st_ino, 0, b""
        if status.st_size == self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return self._entries(whole)

    def _entries(self, lines: Iterable[bytes]) -> list[Entry]:
        entries = [self._entry(line.decode(errors="replace")) for line in lines]
        # lines at the very beginning have no line before them: they take the time of the first that has one, or,
        # where a process never came to log anything, of the file
        known = next((entry.time for entry in entries if entry.time), 0.0) or self.path.stat().st_mtime
        return [entry if entry.time else replace(entry, time=known) for entry in entries]

    def _entry(self, raw: str) -> Entry:
        fields = _fields(raw)
        if fields is None:
            return Entry(self._time, self.process, "", raw, {}, raw)
        self._time = fields.pop("time")
        fields.pop("process", None)
        return Entry(
            self._time, self.process, str(fields.pop("level", "")), str(fields.pop("event", "")), fields, raw
        )


def _fields(raw: str) -> dict[str, Any] | None:
    """The fields of a line with a ``time`` (in seconds since 1970); None for any other line."""
    if not raw.startswith("{"):
        return None
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        fields["time"] = datetime.fromisoformat(fields["time"]).astimezone(UTC).timestamp()
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
    return fields


class LogFiles:
    """The logs of some processes, or of all that there are."""

    def __init__(self, directory: Path, names: Sequence[str] = ()) -> None:
        self._directory = directory
        self._names = names
        self._files: dict[Path, LogFile] = {}

    def known(self) -> list[str]:
        """Processes that have a log, sorted."""
        return sorted(path.stem for path in self._directory.glob("*.log"))

    def tail(self, lines: int) -> list[Entry]:
        """The last ``lines`` lines of all of them together."""
        entries = _merged(file.tail(lines) for file in self._new_files())
        return entries[-lines:] if lines else []

    def follow(self) -> Iterator[Entry]:
        """What is written from now on, without end."""
        while True:
            self._new_files()
            yield from _merged(file.more() for file in self._files.values())
            time.sleep(LOOK_EVERY_S)

    def _new_files(self) -> list[LogFile]:
        wanted = [name for name in self.known() if not self._names or name in self._names]
        paths = [self._directory / f"{name}.log" for name in wanted]
        new = {path: LogFile(path) for path in paths if path not in self._files}
        self._files.update(new)
        return list(new.values())


def _merged(parts: Iterable[list[Entry]]) -> list[Entry]:
    # sorted() is stable: lines of one file with one time stay in order
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry.time)
