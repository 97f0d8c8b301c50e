"""Start a run: in this process, or in one of its own in the background.

A background supervisor writes one line of JSON to the pipe that its starter gave it whenever ``state.json`` has
changed, when everything serves, and when it is over; the starter reads them until one of the last two.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from dsctl.supervise.board import Board
from dsctl.supervise.events import Note, Over
from dsctl.supervise.plan import Plan, make_plan
from dsctl.supervise.record import RunRecord
from dsctl.supervise.rundir import RunDir, already_runs, locate
from dsctl.supervise.supervisor import supervise
from dsobserve.logging import configure
from dstopology.load import check_servable, load
from dswire.errors import DsError, ErrorInfo, StartFailed, from_info

#: a background supervisor that was told to stop has this long to do so before it is left to itself
STOP_WAIT_S = 30.0


class _Line(msgspec.Struct, omit_defaults=True):
    """From a background supervisor to its starter."""

    kind: str
    exit_code: int = 0
    error: ErrorInfo | None = None


def prepare(file: Path, node: str | None) -> Plan:
    """Load and check the topology, and everything else that can be known before anything starts.

    Raises :class:`DsError`: bad topology, no engine, no model, or it runs already.
    """
    topology = load(file)
    check_servable(topology)
    plan = make_plan(topology, node)
    running = locate(topology.path)
    if running is not None and (holder := running.holder()) is not None:
        raise already_runs(holder, running.path)
    if importlib.util.find_spec("torch") is None:
        raise StartFailed(
            "the engine is not installed: there is no torch", remedy="`pip install 'distserve[engine]'`"
        )
    # imported here: nothing above needs the store
    from dsengine.store import resolve

    resolve(topology.model.path)
    return plan


def foreground(plan: Plan, wait_s: float, console: Console, hint: Callable[[RunRecord], None]) -> int:
    """Be the supervisor until it is over; returns the exit status. Raises the error that ended the start."""
    run = RunDir(plan.topology.run_dir)
    run.make()
    with run.locked(plan.topology.path):
        run.rotate_logs()
        with run.log_of("supervisor").open("a") as log:
            configure("supervisor", json=True, stream=log)
            board = _Hinting(console, hint)
            try:
                over = supervise(plan, run, board, wait_s)
            finally:
                board.close()
                configure("dsctl")
    return _result(over.exit_code, over.error)


class _Hinting(Board):
    """A board that also says how to talk to what runs now."""

    def __init__(self, console: Console, hint: Callable[[RunRecord], None]) -> None:
        super().__init__(console)
        self._hint = hint

    def ready(self, record: RunRecord) -> None:
        """End the table, and tell how to go on."""
        super().ready(record)
        self._hint(record)


def _result(exit_code: int, error: ErrorInfo | None) -> int:
    if error is not None:
        raise from_info(error)
    return exit_code


# in the background


def background(plan: Plan, node: str | None, wait_s: float, console: Console) -> RunRecord:
    """Start a supervisor of its own, and wait until everything serves. Raises the error that ended the start.

    Ctrl-C before that stops what was started.
    """
    run = RunDir(plan.topology.run_dir)
    run.make()
    read_end, write_end = os.pipe()
    try:
        process = _spawn(run, plan, node, wait_s, write_end)
    finally:
        os.close(write_end)
    board = Board(console)
    try:
        with open(read_end, "rb") as lines:
            return _await_ready(lines, run, board)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WAIT_S)
        raise
    finally:
        board.close()
        # it lives on without us: nothing is to be said of its end here
        process.returncode = process.returncode or 0


def _spawn(run: RunDir, plan: Plan, node: str | None, wait_s: float, tell_fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dsctl.supervise", str(plan.topology.path)]
    command += ["--wait-s", str(wait_s), "--tell-fd", str(tell_fd), *(["--node", node] if node else [])]
    with (run.path / "supervisor.err").open("wb") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            pass_fds=(tell_fd,),
        )


def _await_ready(lines: io.BufferedReader, run: RunDir, board: Board) -> RunRecord:
    for text in lines:
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError:
            break
        if line.error is not None:
            raise from_info(line.error)
        record = run.read()
        if line.kind == "ready" and record is not None:
            board.ready(record)
            return record
        if line.kind == "over":
            raise StartFailed(
                f"it was stopped while it started (exit status {line.exit_code})", remedy="start it again"
            )
        if record is not None:
            board.show(record)
    last = (run.path / "supervisor.err").read_text(errors="replace").strip().splitlines()[-1:]
    raise StartFailed(
        f"the supervisor ended unexpectedly{': ' if last else ''}{''.join(last)}",
        remedy=f"see {run.path / 'supervisor.err'}",
    )


class _Teller:
    """Tells the starter; it does not matter when there is none any more, or when it does not read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        os.set_blocking(descriptor, False)

    def show(self, record: RunRecord) -> None:
        """There is a new state file."""
        self.tell(_Line("changed"))

    def note(self, note: Note) -> None:
        """The log has it."""

    def ready(self, record: RunRecord) -> None:
        """Last word to the starter."""
        self.tell(_Line("ready"))
        self.close()

    def over(self, over: Over) -> None:
        """Last word, if the start failed."""
        self.tell(_Line("over", over.exit_code, over.error))
        self.close()

    def tell(self, line: _Line) -> None:
        """Write one line; the pipe has room for all that are ever written, changes aside."""
        if self._descriptor is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Say nothing more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def main(arguments: list[str] | None = None) -> int:
    """Be a background supervisor: ``python -m dsctl.supervise TOPOLOGY ...``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dsctl.supervise")
    parser.add_argument("topology", type=Path)
    parser.add_argument("--node")
    parser.add_argument("--wait-s", type=float, required=True)
    parser.add_argument("--tell-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    teller = _Teller(options.tell_fd)
    try:
        return _supervise(options.topology, options.node, options.wait_s, teller)
    except DsError as error:
        teller.tell(_Line("over", error.exit_code, error.info()))
        return error.exit_code


def _supervise(path: Path, node: str | None, wait_s: float, teller: _Teller) -> int:
    plan = make_plan(load(path), node)
    run = RunDir(plan.topology.run_dir)
    with run.locked(plan.topology.path):
        run.rotate_logs()
        with run.log_of("supervisor").open("a") as log:
            configure("supervisor", json=True, stream=log)
            return supervise(plan, run, teller, wait_s).exit_code
