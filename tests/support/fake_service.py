"""A service that serves nothing and behaves as its test says; in the real process frame of ``dswire.process``.

``$FAKE_DIR/NAME.json`` holds what each start does, the last entry also for all later starts: ``serve``; ``slow``
(never ready); ``deaf`` (serves, and ignores SIGTERM and the lifeline); ``crash`` (serves, then kills itself);
``exit N``; ``refuse CODE`` (ends with that error). ``$FAKE_DIR/NAME.pids`` gets a line for each start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsobserve.logging import configure
from dswire.actor import Actor
from dswire.errors import ErrorInfo, from_info
from dswire.process import run

SERVICES = ("dsrouter", "dsprefill", "dsdecode", "dsrelay")


class Idle:
    """A machine to which nothing happens."""

    def handle(self, event: object) -> Sequence[Any]:
        """Nothing."""
        return []

    def next_deadline(self) -> float | None:
        """Never."""
        return None

    def validate(self) -> None:
        """Always fine."""


def install(directory: Path) -> None:
    """Make packages in ``directory`` that stand in for the services when it comes first in PYTHONPATH."""
    for name in SERVICES:
        (directory / name).mkdir()
        # without it the real package, found later, would win
        (directory / name / "__init__.py").touch()
        (directory / name / "__main__.py").write_text("from support.fake_service import main\nmain()\n")


def main() -> None:
    """Run one fake process; ends with its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", required=True)
    parser.add_argument("--name", required=True)
    name = parser.parse_args().name
    configure(name)
    directory = Path(os.environ["FAKE_DIR"])
    behaviour = _next(directory, name)
    if behaviour.startswith("exit"):
        sys.exit(int(behaviour.split()[1]))

    async def build(phase: Callable[[str], None]) -> Actor:
        phase("loading model")
        if behaviour.startswith("refuse"):
            raise from_info(ErrorInfo(behaviour.split()[1], "the fake refuses", "ask the fake"))
        return Serving(behaviour)

    sys.exit(run(name, Path(os.environ["DS_RUN_DIR"]), build))


def _next(directory: Path, name: str) -> str:
    with (directory / f"{name}.pids").open("a+") as pids:
        print(os.getpid(), file=pids, flush=True)
        pids.seek(0)
        start = len(pids.readlines()) - 1
    try:
        plan: list[str] = json.loads((directory / f"{name}.json").read_text())
    except FileNotFoundError:
        plan = ["serve"]
    return plan[min(start, len(plan) - 1)]


class Serving(Actor):
    """Serves nothing, and may crash or be deaf."""

    def __init__(self, behaviour: str) -> None:
        super().__init__(Idle(), [])
        self._behaviour = behaviour

    def started(self) -> None:
        """Be ready, then misbehave."""
        if self._behaviour == "slow":
            return
        super().started()
        if self._behaviour == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._behaviour == "deaf":
            # a child in the same group, and a loop that hears of nothing any more
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            subprocess.run(["sleep", "600"], check=False)
