"""What every service process does around its actor: loop, signals, readiness, lifeline, exit status.

Exit status: 0 after an orderly stop, an error's ``exit_code`` when it could not serve (the sentence goes to the
log and, where there is a supervisor, to it), 70 for a bug.

Under a supervisor two environment variables name inherited pipe ends. ``DS_REPORT_FD``: the process writes one
line of JSON for each step of its start (``{"phase": "loading model"}``, at last ``{"phase": "ready"}``, or
``{"error": {...}}``). ``DS_LIFELINE_FD``: the process reads it and stops in good order when the supervisor is
gone, however it died, so there are no orphans. ``<run_dir>/<name>.ready`` exists while the process serves; that
is what container health checks look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import structlog
import uvloop

from dswire.actor import Actor
from dswire.errors import DsError, DuplicateName, Failed

log = structlog.get_logger()

#: an orderly stop that takes longer, in seconds, ends the hard way
STOP_LIMIT_S = 10.0
EXIT_BUG = 70

#: builds an actor; it is given ``phase``, to tell how far the start is
Build = Callable[[Callable[[str], None]], Awaitable[Actor]]


def run(name: str, run_dir: Path, build: Build) -> int:
    """Build the actor and serve until SIGTERM, SIGINT or the supervisor's death; returns the exit status."""
    report = _Reporter()
    status = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(name, run_dir, build, report))
    except* DsError as group:
        status = _told(report, _first(group))
    except* Exception as group:  # process boundary: a bug is logged whole and ends the process
        log.exception("unexpected error", process=name)
        report.error(Failed(f"{name}: {_first(group)!r}"))
        status = EXIT_BUG
    return status


def refuse(error: DsError) -> int:
    """Tell log and supervisor why this process does not even begin; returns the exit status."""
    return _told(_Reporter(), error)


def leave(status: int) -> NoReturn:
    """End the process now: taking torch down again module by module would cost a second or more."""
    logging.shutdown()
    # the disk under them may be full
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _told(report: _Reporter, error: BaseException) -> int:
    assert isinstance(error, DsError)
    log.error(error.message, code=error.code, remedy=error.remedy)
    report.error(error)
    return error.exit_code


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _serve(name: str, run_dir: Path, build: Build, report: _Reporter) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    actors: list[Actor] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop, loop, actors)
    _watch_lifeline(stop, loop, actors)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_one(run_dir, name))
        actor = await build(report.phase)
        actors.append(actor)

        def on_ready() -> None:
            stack.enter_context(_ready_file(run_dir, name))
            report.phase("ready")
            log.info("ready", process=name)

        report.phase("registering")
        await actor.run(stop, on_ready)
    log.info("stopped", process=name)


def _stop(stop: asyncio.Event, loop: asyncio.AbstractEventLoop, actors: Sequence[Actor]) -> None:
    stop.set()
    loop.call_later(STOP_LIMIT_S, _end_hard, actors)


def _end_hard(actors: Sequence[Actor]) -> None:
    # a step that hangs in a kernel cannot be interrupted from Python
    for actor in actors:
        actor.abandon()
    log.error("the orderly stop took too long", limit_s=STOP_LIMIT_S)
    os._exit(1)


def _watch_lifeline(stop: asyncio.Event, loop: asyncio.AbstractEventLoop, actors: Sequence[Actor]) -> None:
    number = os.environ.get("DS_LIFELINE_FD")
    if number is None:
        return
    fd = int(number)

    def on_readable() -> None:
        # nobody writes to it: readable means end of file, the supervisor is gone
        loop.remove_reader(fd)
        log.warning("the supervisor is gone, stopping")
        _stop(stop, loop, actors)

    loop.add_reader(fd, on_readable)


@contextlib.contextmanager
def _only_one(run_dir: Path, name: str) -> Iterator[None]:
    """Hold the name on this host: a second process under it would replace the first one's KV pool."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (run_dir / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DuplicateName(f"a process named {name!r} of this topology runs on this host already") from None
        # one that was killed left its own behind, and this one does not serve yet
        (run_dir / f"{name}.ready").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _ready_file(run_dir: Path, name: str) -> Iterator[None]:
    path = run_dir / f"{name}.ready"
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        # only who looks for the file misses it
        log.warning("serving, but the file that says so cannot be written", path=str(path), why=error.strerror)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class _Reporter:
    """Tells the supervisor how far the start is; silent without one."""

    def __init__(self) -> None:
        number = os.environ.get("DS_REPORT_FD")
        self._fd = int(number) if number is not None else None

    def phase(self, phase: str) -> None:
        self._write({"phase": phase})

    def error(self, error: DsError) -> None:
        self._write({"error": {"code": error.code, "message": error.message, "remedy": error.remedy}})

    def _write(self, line: dict[str, object]) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(line).encode() + b"\n")
        except OSError:
            # the supervisor is gone; the lifeline ends us in good order
            print(line, file=sys.stderr)
            self._fd = None
