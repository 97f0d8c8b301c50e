"""A whole system of real processes for a test: started, looked at, harmed, and checked for leaks."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dsclient import AsyncClient, Client
from dstopology.endpoints import free_ports
from dstopology.load import load
from dstopology.resolved import Topology
from dswire.keys import CurveKeys
from dswire.messages.client import StatusReport, WorkerStatus

#: from starting a process to its "ready", in seconds; two cores import torch twice in about five
START_LIMIT_S = 90.0
STOP_LIMIT_S = 40.0


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    report: int
    log: Path


class System:
    """The processes of one topology. Use as a context manager; leaving it checks that nothing is left behind."""

    def __init__(
        self,
        yaml: str,
        directory: Path,
        *,
        extra_env: dict[str, str] | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        """``yaml`` may say ``{port}`` where a free port is meant, one for each; the one behind it is free too.

        ``keys`` are our clients'.
        """
        while "{port}" in yaml:
            yaml = yaml.replace("{port}", str(free_ports(3)), 1)
        self.directory = directory
        self._keys = keys
        self.path = directory / "topology.yaml"
        self.path.write_text(yaml)
        self._env = {
            **os.environ,
            "DS_RUN_DIR": str(directory / "run"),
            "OMP_NUM_THREADS": "1",
            **(extra_env or {}),
        }
        self.topology: Topology = load(self.path, self._env)
        self._lifeline, self._held = os.pipe()
        self._running: dict[str, _Running] = {}

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.topology.router.frontend_connect

    def __enter__(self) -> System:
        try:
            self.start(*self.topology.process_names())
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        statuses = self._stop_all()
        left = sorted(path.name for path in self.topology.shm_dir.glob(f"ds-{self.topology.digest}-*"))
        for name in left:
            (self.topology.shm_dir / name).unlink()
        os.close(self._lifeline)
        os.close(self._held)
        if error is None:
            assert not left, f"shared memory left behind: {left}"
            assert not any(statuses.values()), f"exit statuses: {statuses}\n{self.logs()}"

    def start(self, *names: str) -> None:
        """Start processes and wait until each has said that it is ready."""
        for name in names:
            self._spawn(name)
        for name in names:
            self._await_ready(name)

    def kill(self, name: str) -> None:
        """SIGKILL, as an out-of-memory killer does it; the file that such a death leaves is the next one's."""
        running = self._running.pop(name)
        running.process.kill()
        running.process.wait(STOP_LIMIT_S)
        os.close(running.report)

    def end_of(self, name: str) -> int:
        """The exit status of a process that ends by itself."""
        running = self._running.pop(name)
        os.close(running.report)
        return running.process.wait(STOP_LIMIT_S)

    def pid(self, name: str) -> int:
        """Of a process that runs."""
        return self._running[name].process.pid

    def log(self, name: str) -> Path:
        """The file that a process logs to."""
        return self.directory / f"{name}.log"

    def freeze(self, name: str) -> None:
        """Stop a process in its tracks."""
        self._running[name].process.send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let it go on."""
        self._running[name].process.send_signal(signal.SIGCONT)

    async def await_status(
        self,
        ask: Callable[[], Awaitable[StatusReport]],
        wanted: Callable[[WorkerStatus], bool],
        limit_s: float = 60.0,
    ) -> None:
        """Wait until some worker is as ``wanted``; workers tell of themselves once a second."""
        async with asyncio.timeout(limit_s):
            while not any(wanted(worker) for worker in (await ask()).workers):
                await asyncio.sleep(0.05)

    async def await_requests(
        self, ask: Callable[[], Awaitable[StatusReport]], wanted: dict[str, int], limit_s: float = 60.0
    ) -> None:
        """Wait until the live requests stand in these phases."""
        async with asyncio.timeout(limit_s):
            while (await ask()).requests != wanted:
                await asyncio.sleep(0.02)

    def logs(self) -> str:
        """What all processes have logged."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.directory.glob("*.log")))

    def client(self) -> Client:
        """A client of this system."""
        return Client(self.address, keys=self._keys)

    def await_connected(self) -> None:
        """Wait until KV goes all the way; "ready" says only that the router knows every process."""
        with self.client() as client:
            client.generate(prompt_ids=(1000, 1001), temperature=0.0, max_tokens=2, ignore_eos=True)

    def await_idle(self, limit_s: float) -> None:
        """Wait until no instance holds a block and no relay a handle; fails after ``limit_s``."""
        began = time.monotonic()
        deadline = began + limit_s
        with self.client() as client:
            while True:
                report = client.status()
                held = _held(report)
                # what was told before we began to wait says nothing
                if not held and max(one.report_age_s for one in report.workers) < time.monotonic() - began:
                    return
                assert time.monotonic() < deadline, f"still held after {limit_s} s: {held}\n{self.logs()}"
                time.sleep(0.25)

    def _spawn(self, name: str) -> None:
        report, child_end = os.pipe()
        role = self.topology.role_of(name)
        log = self.log(name)
        command = [sys.executable, "-m", f"ds{role}", "--topology", str(self.path), "--name", name]
        env = {**self._env, "DS_REPORT_FD": str(child_end), "DS_LIFELINE_FD": str(self._lifeline)}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=env,
                stdout=out,
                stderr=out,
                pass_fds=(child_end, self._lifeline),
                start_new_session=True,
            )
        os.close(child_end)
        self._running[name] = _Running(process, report, log)

    def _await_ready(self, name: str) -> None:
        running = self._running[name]
        deadline = time.monotonic() + START_LIMIT_S
        told = b""
        while b'"ready"' not in told:
            readable, _, _ = select.select([running.report], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(running.report, 4096) if readable else b""
            assert more, f"{name} is not ready after {told!r}\n{self.logs()}"
            told += more

    def _stop_all(self) -> dict[str, int]:
        for running in self._running.values():
            running.process.send_signal(signal.SIGTERM)
        statuses = {}
        for name, running in self._running.items():
            try:
                statuses[name] = running.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                running.process.kill()
                statuses[name] = running.process.wait()
            os.close(running.report)
        self._running.clear()
        return statuses

    def _kill_all(self) -> None:
        for name in list(self._running):
            self.kill(name)


def _held(report: StatusReport) -> dict[str, object]:
    held: dict[str, object] = {"requests": report.requests} if report.requests else {}
    for worker in report.workers:
        live = {state: count for state, count in worker.handles.items() if count}
        if worker.blocks_held or live or worker.waiting or worker.running:
            held[worker.name] = worker
    return held


@contextmanager
def running_system(
    yaml: str, *, extra_env: dict[str, str] | None = None, keys: CurveKeys | None = None
) -> Iterator[System]:
    """Start a system in a directory whose path is short enough for its sockets."""
    directory = Path(tempfile.mkdtemp(prefix="ds-"))
    try:
        with System(yaml, directory, extra_env=extra_env, keys=keys) as system:
            yield system
    finally:
        shutil.rmtree(directory)


async def ask(client: AsyncClient, prompt: Sequence[int], count: int) -> list[int]:
    """What a system answers, greedily."""
    made = await client.generate(prompt_ids=prompt, temperature=0.0, max_tokens=count, ignore_eos=True)
    return list(made.choices[0].token_ids)
