"""Workloads of one's own: CSV with a heading, or JSON lines.

Columns (keys) ``prompt_tokens`` and ``output_tokens``, and where the arrivals are to be replayed ``at_s``, seconds
in ascending order. A column ``TIMESTAMP`` (Azure's traces) has dates and times, counted from the first row's. Other
columns are ignored. Whatever is wrong is told with row and column.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dssim.workload import Arrival
from dswire.errors import BadInput

#: column of dates and times
DATED = "TIMESTAMP"
#: names that public traces give the same columns
ALIASES = {
    "at_s": ("at_s", "arrived_at", "arrival_s", DATED),
    "prompt_tokens": ("prompt_tokens", "num_prefill_tokens", "input_length", "ContextTokens"),
    "output_tokens": ("output_tokens", "num_decode_tokens", "output_length", "GeneratedTokens"),
}
#: requests of one file
MAX_ROWS = 5_000_000


def read(path: Path) -> tuple[list[Arrival], bool]:
    """The requests of a file, and whether it tells when they arrive (else ``at_s`` is 0).

    Raises :class:`BadInput`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(path, file) if path.suffix == ".jsonl" else _csv_rows(path, file)
            return _arrivals(path, rows)
    except OSError as error:
        raise BadInput(f"workload {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"workload {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _json_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
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


def _arrivals(path: Path, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> tuple[list[Arrival], bool]:
    made: list[Arrival] = []
    names: dict[str, str] = {}
    first_s = 0.0
    for number, row in rows:
        names = names or _columns(path, number, row)
        if len(made) == MAX_ROWS:
            raise BadInput(f"{path}: more than {MAX_ROWS} requests", remedy="split the file")
        at_s = _arrival(path, number, row, names["at_s"]) if "at_s" in names else 0.0
        first_s = at_s if not made and names.get("at_s") == DATED else first_s
        at_s -= first_s
        prompt = _count(path, number, row, names["prompt_tokens"])
        made.append(Arrival(at_s, prompt, _count(path, number, row, names["output_tokens"])))
        if len(made) > 1 and at_s < made[-2].at_s:
            where = f"{path}:{number}: column {names['at_s']}"
            raise BadInput(f"{where}: {at_s:g} comes before the row above it", remedy="sort the rows by arrival")
    if not made:
        raise BadInput(f"{path} has no requests")
    return made, "at_s" in names


def _columns(path: Path, number: int, row: Mapping[str, Any]) -> dict[str, str]:
    found = {ours: next((name for name in names if name in row), "") for ours, names in ALIASES.items()}
    for column in ("prompt_tokens", "output_tokens"):
        if not found[column]:
            raise BadInput(
                f"{path}:{number}: column {column} is missing",
                remedy="name the columns prompt_tokens, output_tokens and, to replay arrivals, at_s",
            )
    return {ours: name for ours, name in found.items() if name}


def _arrival(path: Path, number: int, row: Mapping[str, Any], column: str) -> float:
    if column != DATED:
        return _number(path, number, row, column, 0.0)
    try:
        # without a zone it is as good as UTC: only differences count
        return datetime.fromisoformat(str(row.get(column))).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise BadInput(f"{path}:{number}: column {column}: {row.get(column)!r} is no date and time") from error


def _number(path: Path, number: int, row: Mapping[str, Any], column: str, least: float) -> float:
    value = row.get(column)
    try:
        read = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not least <= read < math.inf:
        raise BadInput(f"{path}:{number}: column {column}: {value!r} is not a number of at least {least:g}")
    return read


def _count(path: Path, number: int, row: Mapping[str, Any], column: str) -> int:
    value = _number(path, number, row, column, 1.0)
    if value != int(value):
        raise BadInput(f"{path}:{number}: column {column}: {value:g} is not a whole number")
    return int(value)
