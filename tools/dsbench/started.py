"""A system of this host for the time of a measurement: started as ``dsctl up`` does, and stopped after it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

#: longest time that everything may take to serve, and to stop
START_S, STOP_S = 120.0, 30.0


@contextmanager
def started(path: Path, console: Console) -> Iterator[None]:
    """Run the topology at ``path`` inside of the context, which SIGTERM leaves as Ctrl-C does.

    Raises :class:`DsError` when it does not start.
    """
    from dsctl.down import stop
    from dsctl.supervise.launch import background, prepare
    from dsctl.supervise.rundir import RunDir

    plan = prepare(path, None)
    # the system is a process of its own: it would outlive this one
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        background(plan, None, START_S, console)
        try:
            yield
        finally:
            stop(RunDir(plan.topology.run_dir), STOP_S)
    finally:
        signal.signal(signal.SIGTERM, before)
