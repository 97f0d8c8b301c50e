"""``dsctl logs``: show or follow the logs of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.topology import file_option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dsctl.logfiles import Entry
    from dsctl.supervise.rundir import RunDir

COLOURS = ("cyan", "magenta", "green", "blue", "bright_cyan", "bright_magenta", "bright_green", "bright_blue")
LEVELS = {"debug": "dim", "warning": "yellow", "error": "bold red", "critical": "bold red"}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Age(click.ParamType[float]):
    """``90s``, ``5m``, ``2h``: seconds."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds; a usage error for anything else."""
        found = _AGE.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is no age such as 90s, 5m or 2h", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


@click.command()
@click.argument("names", nargs=-1)
@file_option
@click.option("--follow", "-F", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=200, show_default=True, help="At most this many."
)
@click.option("--since", "age_s", type=Age(), default=None, help="Only younger lines: 90s, 5m, 2h.")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are in the files.")
def command(
    names: tuple[str, ...], file: Path | None, follow: bool, lines: int, age_s: float | None, as_json: bool
) -> None:
    """Show the logs of the running system, or of its last run, in time order.

    NAMES are processes, such as decode-0 or supervisor; all when left out.

    \b
    dsctl logs --follow
    dsctl logs decode-0 prefill-0 -n 50 --since 5m
    """
    from rich.console import Console

    from dsctl.logfiles import LogFiles

    files = LogFiles(_run(file).logs, names)
    _check(names, files.known())
    console = Console(highlight=False)
    printer = _Printer(console, files.known(), as_json)
    since = 0.0 if age_s is None else time.time() - age_s
    printer.print(entry for entry in files.tail(lines) if entry.time >= since)
    if follow:
        printer.print(files.follow())


def _run(file: Path | None) -> RunDir:
    from dsctl.supervise.rundir import locate
    from dstopology.load import find
    from dswire.errors import BadInput

    path = find(file)
    run = locate(path)
    if run is None:
        raise BadInput(f"{path}: has never run here", remedy=f"start it with `dsctl up -f {path}`")
    return run


def _check(names: Iterable[str], known: list[str]) -> None:
    from dswire.errors import BadInput

    for name in names:
        if name not in known:
            raise BadInput(f"there is no log of {name!r}", remedy=f"use one of {', '.join(known)}")


class _Printer:
    """Prints entries, each process in a colour of its own."""

    def __init__(self, console: Console, known: list[str], as_json: bool) -> None:
        self._console = console
        self._known = known
        self._width = max(map(len, known), default=0)
        self._as_json = as_json

    def print(self, entries: Iterable[Entry]) -> None:
        """Print them as they come."""
        for entry in entries:
            if self._as_json:
                click.echo(entry.raw)
            else:
                self._console.print(self._text(entry), soft_wrap=True)

    def _text(self, entry: Entry) -> Text:
        from rich.text import Text

        colour = COLOURS[self._known.index(entry.process) % len(COLOURS)] if entry.process in self._known else ""
        style = LEVELS.get(entry.level, "")
        clock = time.strftime("%H:%M:%S", time.localtime(entry.time)) + f".{entry.time % 1 * 1000:03.0f} "
        line = Text.assemble((clock, "dim"), (f"{entry.process:<{self._width}}  ", colour))
        line.append(entry.text, style)
        trace = entry.fields.pop("exception", None)
        for key, value in entry.fields.items():
            line.append(f" {key}=", "dim").append(str(value))
        if trace:
            line.append(f"\n{trace}", style)
        return line
