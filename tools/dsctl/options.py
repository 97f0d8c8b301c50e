"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dswire.errors import BadInput

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

#: what ``--workload`` takes
WORKLOADS = (
    "sharegpt, humaneval, longbench, fixed:IN,OUT, a .csv or .jsonl file, like:FILE or servegen:RATES,LENGTHS; "
    "docs/workloads.md tells of each."
)


#: what a plot may be
PLOTS = (".png", ".svg", ".pdf")


class NewFile(click.ParamType[Path]):
    """A file to be written: refused at once where that cannot be, not after minutes of work."""

    name = "file"

    def __init__(self, what: str, *endings: str) -> None:
        #: what it will hold, for messages
        self._what = what
        #: one of which it has; any where there are none
        self._endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises :class:`BadInput`."""
        path = Path(value)
        if problem := self._problem(path):
            ends = f" ending in {' or '.join(self._endings)}" if self._endings else ""
            raise BadInput(
                f"the {self._what} cannot be written to {path}: {problem}",
                remedy=f"name a file{ends} in a directory that is there and yours",
            )
        return path

    def _problem(self, path: Path) -> str:
        if path.is_dir():
            return "it is a directory"
        if self._endings and path.suffix.lower() not in self._endings:
            return f"it does not end in {' or '.join(self._endings)}"
        if not path.parent.is_dir():
            return f"there is no directory {path.parent}"
        return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "permission denied"


def wrote(path: Path) -> None:
    """Tell on stderr, so that stdout is the figures alone."""
    click.echo(f"written to {path}", err=True)


def workload_option(default: str) -> Callable[[CommandT], CommandT]:
    """``--workload``."""
    return click.option("--workload", default=default, show_default=True, metavar="WHAT", help=WORKLOADS)


def arrival_options(function: CommandT) -> CommandT:
    """``--arrival`` and ``--cv``: how evenly requests come."""
    kinds = click.Choice(["poisson", "gamma", "constant"])
    for option in (
        click.option("--cv", type=float, default=1.0, show_default=True, help="Burstiness of gamma arrivals."),
        click.option("--arrival", type=kinds, default="poisson", show_default=True),
    ):
        function = option(function)
    return function
