"""How a start looks in the terminal: a live table of the processes, then a line for whatever happens.

Off a terminal every change of a process is a plain line instead.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dsctl.supervise.events import Note, Over
from dsctl.supervise.record import ProcessRecord, RunRecord

#: style of a phase
STYLES = {
    "down": "red",
    "starting": "yellow",
    "ready": "green",
    "stopping": "yellow",
    "ended": "dim",
    "given up": "bold red",
}
LEVELS = {"info": "green", "warning": "yellow", "error": "bold red"}
#: of the live table, for its seconds
REFRESH_PER_S = 4


class Board:
    """Shows one run. :meth:`close` gives the terminal back; doing it twice is harmless."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._record: RunRecord | None = None
        self._lines: dict[str, str] = {}
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=REFRESH_PER_S)
            self._live.start()

    def show(self, record: RunRecord) -> None:
        """Show the present state."""
        if record.stopping and not (self._record and self._record.stopping):
            self._console.print("stopping: router, then prefill and decode, then relays", style="dim")
        starting = self._record is None or self._record.ready_s is None
        self._record = record
        if starting and not self._console.is_terminal:
            self._print_changes(record)

    def note(self, note: Note) -> None:
        """Print what happened."""
        line = Text.assemble(
            (time.strftime("%H:%M:%S "), "dim"), (note.name, "bold"), " ", (note.text, LEVELS[note.level])
        )
        self._console.print(line, soft_wrap=True)

    def ready(self, record: RunRecord) -> None:
        """End the table, and tell how to go on."""
        self.show(record)
        self.close()
        took = f"ready in {record.ready_s or 0.0:.1f} s"
        self._console.print(Text.assemble((took, "bold green"), f": {record.model} at {record.frontend}"))

    def over(self, over: Over) -> None:
        """End the table."""
        self.close()

    def close(self) -> None:
        """Leave the table as it is now, and stop to refresh it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print_changes(self, record: RunRecord) -> None:
        for process in record.processes:
            line = state_text(process)
            if self._lines.get(process.name) != line:
                self._lines[process.name] = line
                self._console.print(f"{process.name}: {line}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("process", "device", "pid", "state"):
            table.add_column(heading, no_wrap=heading != "state")
        table.add_column("seconds", justify="right", no_wrap=True)
        for process in self._record.processes if self._record else ():
            table.add_row(
                Text(process.name, "bold"),
                ", ".join(process.devices) or "-",
                str(process.pid or "-"),
                Text(state_text(process), STYLES[process.phase]),
                seconds_text(process, time.time()),
            )
        return table


def state_text(process: ProcessRecord) -> str:
    """Phase and step in words."""
    text = process.step if process.phase == "starting" and process.step else process.phase
    return f"{text} (restart {process.restarts})" if process.restarts else text


def seconds_text(process: ProcessRecord, now: float) -> str:
    """How long the start took, or takes."""
    if process.started_at is None or process.phase not in ("starting", "ready"):
        return "-"
    return f"{(process.ready_at or now) - process.started_at:.1f}"
