"""``dsctl down``: stop what ``dsctl up`` runs, in order."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsctl.topology import file_option

if TYPE_CHECKING:
    from dsctl.supervise.rundir import RunDir


@click.command()
@file_option
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0.1),
    default=20.0,
    show_default=True,
    help="Tell of a failure when it still runs after this many seconds.",
)
def command(file: Path | None, timeout_s: float) -> None:
    """Stop the processes that `dsctl up` started from a topology, in order. Nothing running is fine."""
    from dsctl.supervise.rundir import locate
    from dstopology.load import find

    path = find(file)
    run = locate(path)
    if run is None or run.holder() is None:
        if run is not None:
            _clean_up(run, path)
        click.echo(f"{path}: not running")
        return
    began = time.monotonic()
    stop(run, timeout_s)
    click.echo(f"{path}: stopped in {time.monotonic() - began:.1f} s")


def _clean_up(run: RunDir, path: Path) -> None:
    """End and remove what a supervisor that was killed has left."""
    from dsctl.supervise.leftovers import clean_record

    with run.locked(path.resolve()):
        for line in clean_record(run):
            click.echo(f"left by a supervisor that was killed: {line}")


def stop(run: RunDir, timeout_s: float) -> None:
    """SIGTERM to the supervisor of ``run``, and wait until it is gone.

    Raises :class:`Failed` when it still runs after ``timeout_s`` seconds.
    """
    from dsctl.supervise.record import start_ticks
    from dswire.errors import Failed

    holder = run.holder()
    if holder is None:
        return
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(holder.pid)
        try:
            # with the descriptor open the pid cannot be used again: now it is the holder, or it is not
            if start_ticks(holder.pid) != holder.start_ticks:
                return
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if not select.select([descriptor], [], [], timeout_s)[0]:
                raise Failed(
                    f"the supervisor (pid {holder.pid}) still runs after {timeout_s:g} s",
                    remedy="wait for it, or say `dsctl down` once more: then it kills what does not stop",
                )
        finally:
            os.close(descriptor)
