"""``dsctl up``: start and supervise the processes of a topology on this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.topology import file_option

if TYPE_CHECKING:
    from rich.console import Console

    from dsctl.supervise.record import RunRecord


@click.command()
@file_option
@click.option("--node", default=None, help="Run this node's processes; default: those of every node that is here.")
@click.option("-d", "--detach", is_flag=True, help="Return as soon as everything serves.")
@click.option(
    "--wait-s",
    type=click.FloatRange(min=1.0),
    default=120.0,
    show_default=True,
    help="Give up when not everything serves after this many seconds.",
)
def command(file: Path | None, node: str | None, detach: bool, wait_s: float) -> int:
    """Start every process of a topology on this host, and keep them running.

    A process that ends by itself is started again, later each time; one that crashes five times within a minute
    is given up. Ctrl-C, SIGTERM or `dsctl down` stop everything in order: router, prefill and decode, relays. A
    second Ctrl-C stops at once. The exit status is not 0 when a process had to be given up.

    \b
    dsctl up -f deploy/topologies/laptop.yaml
    dsctl up -d && dsctl chat; dsctl down
    """
    from rich.console import Console

    from dsctl.supervise.launch import background, foreground, prepare
    from dstopology.load import find

    path = find(file)
    plan = prepare(path, node)
    console = Console(highlight=False)
    if not detach:
        return foreground(plan, wait_s, console, lambda record: _hint(console, record, "Ctrl-C"))
    record = background(plan, node, wait_s, console)
    _hint(console, record, f"dsctl down -f {record.topology}")
    return 0


def _hint(console: Console, record: RunRecord, stop: str) -> None:
    rows = [("talk to it", f"dsctl chat -f {record.topology}"), ("stop it", stop)]
    for what, how in rows:
        console.print(f"  {what:<12}{how}", soft_wrap=True, markup=False)
