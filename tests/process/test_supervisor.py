"""``dsctl up`` and ``down`` with real processes; the services in them are fakes that misbehave as told.

The last test does it with the real services and the real model.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dsclient import Client
from dsctl.supervise.record import RunRecord, start_ticks
from dsctl.supervise.rundir import RunDir
from dstopology.endpoints import free_ports
from support import fake_service

NAMES = ("relay-n0", "prefill-0", "decode-0", "router-0")
#: a test that waits longer fails
LIMIT_S = 60.0


@dataclass
class Host:
    """A directory in which ``dsctl`` finds fake services, a model, and room for a run."""

    root: Path
    #: whether fakes stand in for the services
    fakes: bool = True
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("fakes", "shm", "fake", "model"):
            (self.root / name).mkdir()
        fake_service.install(self.root / "fakes")
        for file in ("config.json", "tokenizer.json", "model.safetensors"):
            (self.root / "model" / file).write_text("{}")
        self.topology = self.root / "t.yaml"
        self.topology.write_text(f"model: {self.root / 'model'}\nkv: {{memory: 1MiB}}\n")
        # socket paths are short, and a test's directory need not be
        self.run = RunDir(Path(tempfile.mkdtemp(prefix="ds-")) / "run")

    @property
    def env(self) -> dict[str, str]:
        tests = Path(__file__).parents[1]
        path = {"PYTHONPATH": f"{self.root / 'fakes'}:{tests}"} if self.fakes else {}
        return {
            **os.environ,
            **path,
            "DS_RUN_DIR": str(self.run.path),
            "DS_SHM_DIR": str(self.root / "shm"),
            "FAKE_DIR": str(self.root / "fake"),
        }

    def behave(self, name: str, *starts: str) -> None:
        (self.root / "fake" / f"{name}.json").write_text(json.dumps(starts))

    def dsctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsctl", *arguments]
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=self.root
        )

    def up(self, *arguments: str) -> subprocess.Popen[str]:
        """``dsctl up`` in the foreground, running."""
        command = [sys.executable, "-m", "dsctl", "up", "-f", str(self.topology), *arguments]
        process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root
        )
        self.started.append(process)
        return process

    def record(self) -> RunRecord:
        record = self.run.read()
        assert record is not None
        return record

    def pids(self, name: str) -> list[int]:
        return [int(line) for line in (self.root / "fake" / f"{name}.pids").read_text().split()]

    def left(self) -> list[Path]:
        """Files that a run must not leave behind."""
        kept = {"logs", "supervisor.err"}
        found = [*self.run.path.iterdir(), *(self.root / "shm").iterdir()]
        return [path for path in found if path.suffix != ".lock" and path.name not in kept]

    def alive(self) -> list[int]:
        """Processes of any run that still exist."""
        files = (self.root / "fake").glob("*.pids")
        pids = [int(line) for path in files for line in path.read_text().split()]
        return [pid for pid in pids if start_ticks(pid) is not None]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    for process in host.started:
        process.kill()
        process.communicate()
    if (holder := host.run.holder()) is not None:
        os.kill(holder.pid, signal.SIGKILL)
    for pid in host.alive():
        os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(host.run.path.parent)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process printed up to and including the line with ``text``."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"it ended without {text!r}:\n{printed}")


def all_up(record: RunRecord) -> bool:
    return all(process.phase == "ready" for process in record.processes)


def wait_gone(pid: int) -> None:
    """Until the process has ended, or LIMIT_S."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], LIMIT_S)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


def test_up_serves_until_sigterm_and_leaves_nothing(host: Host) -> None:
    up = host.up()
    printed = read_until(up, "ready in")
    assert "decode-0: loading model" in printed
    record = host.record()
    assert all_up(record)
    assert [process.name for process in record.processes] == list(NAMES)
    assert {path.name for path in host.run.path.glob("*.ready")} == {f"{name}.ready" for name in NAMES}
    up.send_signal(signal.SIGTERM)
    rest, _ = up.communicate(timeout=LIMIT_S)
    assert up.returncode == 0
    order = [line.split()[1] for line in rest.splitlines() if line.endswith("stopped")]
    assert order[0] == "router-0"
    assert order[-1] == "relay-n0"
    assert sorted(order) == sorted(NAMES)
    assert host.alive() == []
    assert host.left() == []


def test_a_crashed_process_is_started_again(host: Host) -> None:
    host.behave("decode-0", "crash", "serve")
    up = host.up()
    printed = read_until(up, "serves again")
    assert "decode-0 killed by SIGKILL; starts again in 0.5 s" in printed
    assert len(host.pids("decode-0")) == 2
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=LIMIT_S)
    assert up.returncode == 0


def test_a_state_file_that_cannot_be_written_ends_nothing_that_serves(host: Host) -> None:
    up = host.up()
    read_until(up, "ready in")
    # as on a full disk: nothing can be written in the place of this
    (host.run.path / "state.tmp").mkdir()
    os.kill(host.pids("decode-0")[0], signal.SIGKILL)
    read_until(up, "decode-0 serves again")
    up.send_signal(signal.SIGTERM)
    up.communicate(timeout=LIMIT_S)
    assert up.returncode == 0
    assert host.alive() == []
    assert "state.json cannot be written: Is a directory" in host.run.log_of("supervisor").read_text()


def test_a_start_that_cannot_write_its_state_file_says_so(host: Host) -> None:
    host.run.make()
    (host.run.path / "state.tmp").mkdir()
    up = host.up("-d")
    printed, _ = up.communicate(timeout=LIMIT_S)
    assert up.returncode == 5
    assert "error[failed]: " in printed
    assert "state.json cannot be written: Is a directory" in printed
    assert "set DS_RUN_DIR to another" in printed
    assert host.alive() == []


def test_a_refusal_fails_the_start_with_its_error_and_exit_status(host: Host) -> None:
    host.behave("router-0", "refuse port_in_use")
    up = host.up()
    printed, _ = up.communicate(timeout=LIMIT_S)
    assert up.returncode == 3
    assert "error[port_in_use]: the fake refuses" in printed
    assert "remedy: ask the fake" in printed
    assert len(host.pids("router-0")) == 1
    assert host.alive() == []
    assert host.left() == []


def test_a_process_that_always_crashes_is_given_up_and_the_rest_goes_on(host: Host) -> None:
    host.behave("decode-0", "serve", "exit 70")
    up = host.up()
    read_until(up, "ready in")
    os.kill(host.pids("decode-0")[0], signal.SIGKILL)
    read_until(up, "crashed 5 times")
    assert {one.name: one.phase for one in host.record().processes} == {
        "relay-n0": "ready",
        "prefill-0": "ready",
        "decode-0": "given up",
        "router-0": "ready",
    }
    status = host.dsctl("status", "-f", str(host.topology))
    assert status.returncode == 5
    assert "given up" in status.stdout
    up.send_signal(signal.SIGTERM)
    up.communicate(timeout=LIMIT_S)
    assert up.returncode == 5


def test_a_start_that_hangs_ends_in_time_and_says_where(host: Host) -> None:
    host.behave("prefill-0", "slow")
    up = host.up("--wait-s", "4")
    printed, _ = up.communicate(timeout=LIMIT_S)
    assert up.returncode == 5
    assert "not ready within 4 s: prefill-0 (registering)" in printed
    assert host.alive() == []


def test_no_orphans_when_the_supervisor_is_killed(host: Host) -> None:
    up = host.up()
    read_until(up, "ready in")
    pids = [host.pids(name)[0] for name in NAMES]
    up.kill()
    for pid in pids:
        wait_gone(pid)
    assert list(host.run.path.glob("*.ready")) == []
    again = host.up()
    read_until(again, "ready in")


def test_a_deaf_process_that_outlives_its_supervisor_is_ended_by_the_next_command(host: Host) -> None:
    host.behave("decode-0", "deaf")
    up = host.up()
    read_until(up, "ready in")
    (pid,) = host.pids("decode-0")
    up.kill()
    up.wait(LIMIT_S)
    assert start_ticks(pid) is not None
    down = host.dsctl("down", "-f", str(host.topology))
    assert f"left by a supervisor that was killed: ended decode-0 (pid {pid})" in down.stdout
    wait_gone(pid)


def test_a_second_ctrl_c_kills_what_does_not_stop(host: Host) -> None:
    host.behave("router-0", "deaf")
    up = host.up()
    read_until(up, "ready in")
    up.send_signal(signal.SIGINT)
    read_until(up, "decode-0 stopped")
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=LIMIT_S)
    assert up.returncode == 0
    assert host.alive() == []


def test_a_second_up_is_refused_and_harms_nothing(host: Host) -> None:
    up = host.up()
    read_until(up, "ready in")
    second = host.dsctl("up", "-f", str(host.topology))
    assert second.returncode == 3
    assert f"it runs already (pid {up.pid}" in second.stderr
    assert all_up(host.record())


def test_leftovers_of_a_killed_run_are_removed(host: Host) -> None:
    up = host.up()
    read_until(up, "ready in")
    digest = host.record().digest
    up.kill()
    for name in NAMES:
        wait_gone(host.pids(name)[0])
    segment = host.root / "shm" / f"ds-{digest}-decode-0.kv"
    stranger = host.root / "shm" / "ds-other-decode-0.kv"
    for path in (segment, stranger):
        path.write_bytes(b"x")
    (host.run.path / "decode-0.ready").write_text("1\n")
    again = host.up()
    read_until(again, "ready in")
    assert not segment.exists()
    assert stranger.exists()


def test_detached_up_returns_when_all_serve_and_down_stops_it(host: Host) -> None:
    up = host.dsctl("up", "-d", "-f", str(host.topology))
    assert up.returncode == 0, up.stderr
    assert "ready in" in up.stdout
    record = host.record()
    assert all_up(record)
    status = host.dsctl("status", "-f", str(host.topology), "--json")
    assert [one["phase"] for one in json.loads(status.stdout)["processes"]] == ["ready"] * 4
    for name in NAMES:
        assert host.dsctl("health", name, "-f", str(host.topology)).returncode == 0
    down = host.dsctl("down", "-f", str(host.topology))
    assert down.returncode == 0
    assert "stopped in" in down.stdout
    assert host.alive() == []
    assert host.left() == []
    assert host.dsctl("health", "decode-0", "-f", str(host.topology)).returncode == 5
    again = host.dsctl("down", "-f", str(host.topology))
    assert again.returncode == 0
    assert "not running" in again.stdout


def test_detached_up_fails_with_the_error_of_the_process(host: Host) -> None:
    host.behave("decode-0", "refuse model_not_found")
    up = host.dsctl("up", "-d", "-f", str(host.topology))
    assert up.returncode == 2
    assert "error[model_not_found]: the fake refuses" in up.stderr
    assert host.alive() == []
    assert host.left() == []


def test_a_running_system_is_found_after_its_file_was_changed(host: Host) -> None:
    up = host.up()
    read_until(up, "ready in")
    host.topology.write_text("now: [broken")
    down = host.dsctl("down", "-f", str(host.topology))
    assert "stopped in" in down.stdout
    up.communicate(timeout=LIMIT_S)
    assert up.returncode == 0


REAL = """
model: {{path: smollm2-135m-instruct, dtype: float32, max_model_len: 1024}}
router: {{frontend: "tcp://127.0.0.1:{port}"}}
kv: {{memory: 64MiB}}
"""


@pytest.mark.process
@pytest.mark.slow
def test_the_real_services_serve_and_die_with_a_killed_supervisor(host: Host) -> None:
    host.fakes = False
    host.topology.write_text(REAL.format(port=free_ports()))
    up = host.up()
    read_until(up, "ready in")
    record = host.record()
    with Client(record.frontend) as client:
        assert client.generate("The capital of France is", max_tokens=4).choices[0].text
    status = host.dsctl("status", "-f", str(host.topology))
    assert status.returncode == 0, status.stdout
    up.kill()
    for process in record.processes:
        assert process.pid is not None
        wait_gone(process.pid)
    assert list((host.root / "shm").iterdir()) == []
    assert list(host.run.path.glob("*.ready")) == []
    assert "not running" in host.dsctl("down", "-f", str(host.topology)).stdout
    assert host.left() == []
