"""``dsctl status``: what runs, and how it does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsctl.topology import file_option
from dsobserve.terminal import output

if TYPE_CHECKING:
    from rich.table import Table

    from dsctl.overview import Overview, Row

#: exit status when something is down
DOWN = 5
HEADINGS = (
    "process", "device", "state", "uptime", "restarts", "pid", "waiting", "running", "blocks", "cached", "handles"
)  # fmt: skip
#: numbers
RIGHT = ("uptime", "restarts", "pid", "waiting", "running", "blocks", "cached")


@click.command()
@file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path | None, as_json: bool) -> int:
    """Show the processes of a topology with their load.

    The exit status is 0 when everything serves, and 5 when something is down or nothing runs.
    """
    from dsctl.overview import overview
    from dstopology.load import find

    path = find(file)
    seen = overview(path)
    if as_json:
        click.echo(json.dumps(data(seen), indent=2))
    elif not seen.running:
        click.echo(f"{path}: not running")
    else:
        _print(seen)
    return 0 if seen.good else DOWN


def data(seen: Overview) -> dict[str, Any]:
    """What ``--json`` prints."""
    import msgspec

    names = {"state": "phase"}
    processes = [
        {names.get(key, key): value for key, value in msgspec.to_builtins(row).items()} for row in seen.rows
    ]
    return {
        "topology": seen.topology,
        "running": seen.running,
        "good": seen.good,
        "model": seen.model,
        "frontend": seen.frontend,
        "supervisor_pid": seen.supervisor_pid,
        "processes": processes,
        "requests": dict(seen.report.requests) if seen.report else None,
        "ended": dict(seen.report.ended) if seen.report else None,
        "reason": seen.reason,
    }


def _print(seen: Overview) -> None:
    from rich.text import Text

    # what goes to a file or a pipe is not cut
    console = output()
    by = "no supervisor here" if seen.supervisor_pid is None else f"supervisor pid {seen.supervisor_pid}"
    console.print(Text.assemble((seen.model, "bold"), f" at {seen.frontend} ({by})"), soft_wrap=True)
    console.print(table(seen))
    if seen.report is not None:
        console.print(f"requests: {_counts(seen.report.requests)}; ended: {_counts(seen.report.ended)}")
    else:
        console.print(Text(seen.reason, "yellow"), soft_wrap=True)
    for row in seen.rows:
        if row.crash and row.crashed_at is not None:
            when = time.strftime("%H:%M:%S", time.localtime(row.crashed_at))
            told = Text.assemble((row.name, "bold"), f" crashed last at {when}: ", (row.crash, "yellow"))
            console.print(told, soft_wrap=True)


def table(seen: Overview) -> Table:
    """A row for each process."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    cells = [_cells(row) for row in seen.rows]
    # a column without anything in it would only crowd out the others where the terminal is narrow
    shown = [index for index in range(len(HEADINGS)) if any(row[index] for row in cells)]
    for index in shown:
        heading = HEADINGS[index]
        table.add_column(heading, justify="right" if heading in RIGHT else "left", no_wrap=heading != "handles")
    for row in cells:
        table.add_row(*(row[index] for index in shown))
    return table


def _cells(row: Row) -> list[str]:
    worker = row.worker
    style = "green" if row.good else "red"
    # the supervisor sees a process, and the router none: both are told
    state = row.state if worker is None or row.good or worker.state == row.state else f"{row.state}, {worker.state}"
    load = [""] * 5
    if worker is not None:
        blocks = f"{worker.blocks_held}/{worker.blocks}" if worker.blocks else ""
        # of the tokens of prompts that it was to read, those whose KV was there already
        cached = f"{worker.cached_tokens / worker.prompt_tokens:.0%}" if worker.prompt_tokens else ""
        handles = _counts(worker.handles) if worker.handles else ""
        load = [str(worker.waiting), str(worker.running), blocks, cached, handles]
    return [
        f"[bold]{row.name}[/]",
        ", ".join(row.devices) or "-",
        f"[{style}]{state}[/]",
        duration(row.uptime_s),
        "" if row.restarts is None else str(row.restarts),
        str(row.pid or "-"),
        *load,
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number) or "none"


def duration(seconds: float | None) -> str:
    """``12 s``, ``3 min``, ``4.2 h``."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
