"""Standard output for people: as wide as their terminal, and in files and pipes as wide as a table wants to be."""

from __future__ import annotations

import sys

from rich.console import Console

#: characters of a line that no terminal breaks
WIDE = 1000


def counted(number: int, noun: str) -> str:
    """So many of something: 1 device, 2 devices."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def output() -> Console:
    """Numbers are not coloured of themselves."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
