"""Files that people ask for by name: tables, plots, logs of requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dswire.errors import BadInput


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """What the system says of ``path``, which is to hold ``what``, becomes a :class:`BadInput`."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"the {what} cannot be written to {path}: {error.strerror or error}",
            remedy="make room there, or name another file",
        ) from error
