"""Standard output for people: as wide as their terminal, and in files and pipes as wide as a table wants to be."""

from __future__ import annotations

import sys

from rich.console import Console

#: characters of a line that no terminal breaks
WIDE = 1000


def output() -> Console:
    """Numbers are not coloured of themselves."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
