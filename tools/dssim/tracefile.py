"""Workloads out of files: CSV with a heading, or JSON lines; either may be compressed (``.gz``).

Columns (keys) ``prompt_tokens`` and ``output_tokens``, and where the arrivals are to be replayed ``at_s``, seconds
in ascending order. Public traces are read as they are published: Azure's (``TIMESTAMP``, dates and times),
Mooncake's (``timestamp``, milliseconds, with ``hash_ids`` of the prompt's blocks), RAGPulse's (``timestamp``,
seconds), and tables of lengths alone; their times count from the first, in whatever order the rows are. Other
columns are ignored. Whatever is wrong is told with row and column.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, TextIO, TypeAlias

from dssim.workload import HASHED_TOKENS, Arrival
from dswire.errors import BadInput

#: column of dates and times
DATED = "TIMESTAMP"
#: column of seconds, or of milliseconds in a trace with hashes
STAMPED = "timestamp"
#: names that public traces give the same columns
ALIASES = {
    "at_s": ("at_s", "arrived_at", "arrival_s", DATED, STAMPED),
    "prompt_tokens": ("prompt_tokens", "num_prefill_tokens", "input_length", "ContextTokens", "in_tokens"),
    "output_tokens": (
        "output_tokens",
        "num_decode_tokens",
        "output_length",
        "GeneratedTokens",
        "out_tokens",
        "max_new_tokens",
    ),
}
#: column of the hashes of a prompt's blocks, in the rows that have them
HASHED = "hash_ids"
#: endings of the files that can be read
SUFFIXES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")
#: requests of one file
MAX_ROWS = 5_000_000

Row: TypeAlias = Mapping[str, Any]


def read(path: Path) -> tuple[list[Arrival], bool]:
    """The requests of a file, and whether it tells when they arrive (else ``at_s`` is 0).

    Raises :class:`BadInput`.
    """
    with rows_of(path) as rows:
        return _arrivals(path, rows)


@contextmanager
def rows_of(path: Path, what: str = "workload") -> Iterator[Iterator[tuple[int, Row]]]:
    """The rows of a file with their numbers. Raises :class:`BadInput`, inside of the context as well.

    ``what`` is the word for the file in such an error.
    """
    try:
        with _open(path) as file:
            yield _json_rows(path, file) if ".jsonl" in path.suffixes else _csv_rows(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(
            f"{what} {path} is not a whole gzip file: {error}", remedy="fetch it again, whole"
        ) from error
    except OSError as error:
        raise BadInput(
            f"{what} {path} cannot be read: {error.strerror or error}", remedy="name a file that is there and yours"
        ) from error
    except UnicodeDecodeError as error:
        told = f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        raise BadInput(told, remedy="convert it to UTF-8") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _json_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{number}: a JSON object is wanted, not {type(row).__name__}")
        yield number, row


def _arrivals(path: Path, rows: Iterator[tuple[int, Row]]) -> tuple[list[Arrival], bool]:
    made: list[Arrival] = []
    names: dict[str, str] = {}
    for number, row in rows:
        names = names or _columns(path, number, row)
        if len(made) == MAX_ROWS:
            raise BadInput(f"{path}: more than {MAX_ROWS} requests", remedy="split the file")
        at_s = _arrival(path, number, row, names["at_s"]) if "at_s" in names else 0.0
        prompt, output = (_length(path, number, row, names, ours) for ours in ("prompt_tokens", "output_tokens"))
        if names.get("at_s") not in (DATED, STAMPED) and made and at_s < made[-1].at_s:
            where = f"{path}:{number}: column {names['at_s']}"
            raise BadInput(f"{where}: {at_s:g} comes before the row above it", remedy="sort the rows by arrival")
        made.append(Arrival(at_s, prompt, output, _hashes(path, number, row, prompt)))
    if not made:
        raise BadInput(f"{path} has no requests")
    if names.get("at_s") in (DATED, STAMPED):
        made = _from_the_first(made, coarse=names["at_s"] == STAMPED)
    return made, "at_s" in names


def _from_the_first(made: list[Arrival], *, coarse: bool) -> list[Arrival]:
    """In order, and the first at 0; those of one ``coarse`` time are spread until the next time.

    Mooncake's times lie on a grid of 3 s, with as many requests at each as a Poisson process would have: replayed
    as they are, every 3 s would begin with a burst that never was.
    """
    made = sorted(made, key=lambda one: one.at_s)
    first_s = made[0].at_s
    made = [replace(one, at_s=one.at_s - first_s) for one in made]
    ticks = sorted({one.at_s for one in made})
    if not coarse or len(ticks) < 2 or 2 * len(ticks) > len(made):
        return made
    ends = dict(zip(ticks, [*ticks[1:], 2 * ticks[-1] - ticks[-2]], strict=True))
    random = Random(0)
    spread = [replace(one, at_s=random.uniform(one.at_s, ends[one.at_s])) for one in made]
    return sorted(spread, key=lambda one: one.at_s)


def _length(path: Path, number: int, row: Row, names: Mapping[str, str], ours: str) -> int:
    """Tokens; published traces have requests of none (cut off, or refused), which count as one."""
    return max(1, count(path, number, row, names[ours], 1 if names[ours] == ours else 0))


def _columns(path: Path, number: int, row: Row) -> dict[str, str]:
    found = {ours: next((name for name in names if name in row), "") for ours, names in ALIASES.items()}
    for column in ("prompt_tokens", "output_tokens"):
        if not found[column]:
            raise BadInput(
                f"{path}:{number}: column {column} is missing",
                remedy="name the columns prompt_tokens, output_tokens and, to replay arrivals, at_s",
            )
    return {ours: name for ours, name in found.items() if name}


def _arrival(path: Path, number: int, row: Row, column: str) -> float:
    if column == STAMPED:
        unit_s = 1e-3 if isinstance(row.get(HASHED), list) else 1.0
        return amount(path, number, row, column, 0.0) * unit_s
    if column != DATED:
        return amount(path, number, row, column, 0.0)
    try:
        # without a zone it is as good as UTC: only differences count
        return datetime.fromisoformat(str(row.get(column))).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise BadInput(f"{path}:{number}: column {column}: {row.get(column)!r} is no date and time") from error


def _hashes(path: Path, number: int, row: Row, prompt: int) -> tuple[int, ...]:
    """Hashes of blocks of one size; RAGPulse's are of pieces of any size, and left out."""
    found = row.get(HASHED)
    if not isinstance(found, list):
        return ()
    wanted = -(-prompt // HASHED_TOKENS)
    if len(found) != wanted or not all(type(one) is int for one in found):
        where = f"{path}:{number}: column {HASHED}"
        raise BadInput(f"{where}: {wanted} whole numbers are wanted for {prompt} tokens, {len(found)} things came")
    return tuple(found)


def amount(path: Path, number: int, row: Row, column: str, least: float) -> float:
    """The number in a column, ``least`` or more. Raises :class:`BadInput`."""
    value = row.get(column)
    try:
        read = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not least <= read < math.inf:
        raise BadInput(f"{path}:{number}: column {column}: {value!r} is not a number of at least {least:g}")
    return read


def count(path: Path, number: int, row: Row, column: str, least: int) -> int:
    """The whole number in a column, ``least`` or more. Raises :class:`BadInput`."""
    value = amount(path, number, row, column, least)
    if value != int(value):
        raise BadInput(f"{path}:{number}: column {column}: {value:g} is not a whole number")
    return int(value)
