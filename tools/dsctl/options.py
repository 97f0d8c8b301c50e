"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

#: what ``--workload`` takes
WORKLOADS = (
    "sharegpt, humaneval, longbench, fixed:IN,OUT, a .csv or .jsonl file, like:FILE or servegen:RATES,LENGTHS; "
    "docs/workloads.md tells of each."
)


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
