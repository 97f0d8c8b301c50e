"""Standard output for people: as wide as their terminal, and in files and pipes as wide as a table wants to be."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

#: characters of a line that no terminal breaks
WIDE = 1000


def figures(*headings: str, words: int = 1, title: str | None = None) -> Table:
    """A table without lines: the first ``words`` columns are words, and may be broken; the rest are figures."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    made.title, made.title_style, made.title_justify = title, "bold", "left"
    for place, heading in enumerate(headings):
        figure = place >= words
        made.add_column(heading, justify="right" if figure else "left", no_wrap=figure)
    return made


def digits(value: float, count: int = 3) -> str:
    """A figure in ``count`` digits, or in more where it has more before its point: 0.0123, 12.3, 12345."""
    short = f"{value:.{count}g}"
    return f"{value:.0f}" if "e+" in short else short


def counted(number: int, noun: str) -> str:
    """So many of something: 1 device, 2 devices."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def output() -> Console:
    """Numbers are not coloured of themselves."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
