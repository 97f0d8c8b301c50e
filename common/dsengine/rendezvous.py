"""Where ranks on one host find each other: files of a process's run directory that the ranks make.

Invariant: what a killed process left goes when the next one of its name starts, or when its supervisor cleans up.
"""

from __future__ import annotations

import uuid
from pathlib import Path


class Rendezvous:
    """The files of one process, which must be the only one of its name in that directory."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Removes what another one of that ``name`` has left."""
        self._run_dir = run_dir
        self._name = name
        self.clear()

    def new(self) -> Path:
        """For ranks that have never met; no rank that is told of it needs to make it."""
        return self._run_dir / f"{self._name}.ranks.{uuid.uuid4().hex}"

    def clear(self) -> None:
        """Remove all files; ranks that have met need them no more."""
        for path in self._run_dir.glob(f"{self._name}.ranks.*"):
            path.unlink(missing_ok=True)
