"""Lock, state file and leftovers of a run directory; the plan of a host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from dsctl.supervise import leftovers
from dsctl.supervise.plan import ipc_paths, is_here, make_plan
from dsctl.supervise.record import ProcessRecord, RunRecord, start_ticks
from dsctl.supervise.rundir import RunDir, base, locate
from dstopology.load import load
from dstopology.resolved import Topology
from dswire.errors import Refused, TopologyError

TWO_NODES = f"""
model: tiny
nodes:
  - {{name: n0, host: {socket.gethostname()}, devices: [cpu:0]}}
  - {{name: n1, host: 192.0.2.1, devices: [cpu:0]}}
prefill: {{place: [[n0/cpu:0]]}}
decode: {{place: [[n1/cpu:0]]}}
security: {{curve: off}}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.make()
    return run


@pytest.fixture
def topology(tmp_path: Path) -> Topology:
    (tmp_path / "shm").mkdir()
    path = tmp_path / "t.yaml"
    path.write_text("model: tiny\n")
    env = {"DS_RUN_DIR": str(tmp_path / "run"), "DS_SHM_DIR": str(tmp_path / "shm"), "DS_HOME": str(tmp_path)}
    return load(path, env)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def record(topology: Topology, *processes: ProcessRecord) -> RunRecord:
    return RunRecord(
        pid=1,
        topology=str(topology.path),
        digest=topology.digest,
        nodes=("n0",),
        shm_dir=str(topology.shm_dir),
        sockets=(str(topology.run_dir / "relay-n0.sock"),),
        model="tiny",
        frontend="tcp://127.0.0.1:5555",
        keys_dir=None,
        ready_s=None,
        stopping=False,
        processes=processes,
    )


def process(name: str, pid: int | None, ticks: int | None) -> ProcessRecord:
    return ProcessRecord(
        name=name,
        role="decode",
        node="n0",
        devices=("cpu:0",),
        phase="ready",
        step="ready",
        pid=pid,
        start_ticks=ticks,
        restarts=0,
        started_at=1.0,
        ready_at=2.0,
        crash="",
        crashed_at=None,
    )


def test_one_supervisor_at_a_time(run: RunDir, tmp_path: Path) -> None:
    with run.locked(tmp_path / "t.yaml"):
        holder = run.holder()
        assert holder is not None
        assert (holder.pid, holder.topology) == (os.getpid(), str(tmp_path / "t.yaml"))
        with pytest.raises(Refused, match=f"runs already \\(pid {os.getpid()}"), run.locked(tmp_path / "t.yaml"):
            pass
    assert run.holder() is None
    assert run.last_holder() == holder


def test_a_killed_holder_frees_the_lock(run: RunDir) -> None:
    program = (
        "import sys, pathlib; from dsctl.supervise.rundir import RunDir\n"
        f"with RunDir(pathlib.Path({str(run.path)!r})).locked(pathlib.Path('/t.yaml')):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        holder = run.holder()
        assert holder is not None
        assert (holder.pid, holder.start_ticks) == (other.pid, start_ticks(other.pid))
        other.kill()
        other.wait()
    assert run.holder() is None


def test_state_comes_back_whole_and_can_be_forgotten(run: RunDir, topology: Topology) -> None:
    assert run.read() is None
    written = record(topology, process("decode-0", 7, 8))
    run.write(written)
    assert run.read() == written
    run.forget()
    run.forget()
    assert run.read() is None


def test_a_damaged_state_file_is_none(run: RunDir) -> None:
    (run.path / "state.json").write_text('{"pid": "seven"}')
    (run.path / "supervisor.lock").write_text("")
    assert run.read() is None
    assert run.last_holder() is None


def test_logs_of_the_last_run_are_set_aside(run: RunDir) -> None:
    run.log_of("decode-0").write_text("first")
    run.rotate_logs()
    run.log_of("decode-0").write_text("second")
    run.rotate_logs()
    assert {path.name: path.read_text() for path in run.logs.iterdir()} == {"decode-0.log.1": "second"}


def test_the_run_directory_is_private(run: RunDir) -> None:
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_a_run_is_found_by_its_file_whatever_the_file_says_now(topology: Topology) -> None:
    run = RunDir(topology.run_dir)
    run.make()
    env = {"DS_RUN_DIR": str(topology.run_dir)}
    assert locate(topology.path, env) is None
    with run.locked(topology.path):
        topology.path.write_text("[broken")
        found = locate(topology.path, env)
        assert found is not None
        assert found.path == run.path
        assert locate(topology.path.with_name("other.yaml"), env) is None
    # the last run's logs are still of interest
    assert locate(topology.path, env) is not None


def test_of_several_runs_the_live_one_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsctl.supervise.rundir.base", lambda env=None: tmp_path)
    file = tmp_path / "t.yaml"
    live, later = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    for run in (live, later):
        run.make()
    with live.locked(file):
        with later.locked(file):
            # the clock of a file system ticks too slowly to tell the two apart
            os.utime(later.path / "supervisor.lock", (4e9, 4e9))
        found = locate(file, {})
        assert found is not None
        assert found.path == live.path
    found = locate(file, {})
    assert found is not None
    assert found.path == later.path


def test_the_default_base_is_where_topologies_put_their_runs(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("model: tiny\n")
    assert load(path, {"DS_HOME": str(tmp_path)}).run_dir.parent == base({})


def test_plan_of_one_node_and_of_what_is_here(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TWO_NODES)
    topology = load(path, {"DS_HOME": str(tmp_path), "DS_RUN_DIR": "/tmp/ds-plan"})
    here = make_plan(topology, None)
    assert here.nodes == ("n0",)
    assert [spec.name for spec in here.specs] == ["relay-n0", "prefill-0", "router-0"]
    there = make_plan(topology, "n1")
    assert [spec.name for spec in there.specs] == ["relay-n1", "decode-0"]
    assert there.specs[1].command[1:] == ("-m", "dsdecode", "--topology", str(path), "--name", "decode-0")
    assert [socket.name for socket in ipc_paths(here)] == ["relay-n0.sock"]
    with pytest.raises(TopologyError, match="no node named 'n7'"):
        make_plan(topology, "n7")
    elsewhere = replace(topology, nodes=(topology.nodes[1],))
    with pytest.raises(TopologyError, match="none of its nodes is this host"):
        make_plan(elsewhere, None)


def test_a_rank_host_runs_with_the_devices_of_its_own_node(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "model: m\nmode: colocated\ndecode: {pp: 2, place: [[n0/cpu:1, n1/cpu:0]]}\n"
        "nodes: [{name: n0, devices: [cpu:0, cpu:1]}, {name: n1, devices: [cpu:0]}]\n"
    )
    topology = load(path, {"DS_HOME": str(tmp_path), "DS_RUN_DIR": "/tmp/ds-plan"})
    specs = [[(spec.name, spec.devices) for spec in make_plan(topology, node).specs] for node in ("n0", "n1")]
    assert specs == [[("decode-0-n0", ("cpu:1",)), ("router-0", ())], [("decode-0", ("cpu:0",))]]
    assert make_plan(topology, "n0").specs[0].command[2] == "dsrankhost"


def test_an_address_of_our_own_is_here(topology: Topology) -> None:
    node = topology.nodes[0]
    assert is_here(replace(node, host="127.0.0.1"))
    assert is_here(replace(node, host=socket.gethostname()))
    assert not is_here(replace(node, host="192.0.2.1"))


def test_clean_removes_what_the_run_left_and_nothing_else(topology: Topology) -> None:
    run = RunDir(topology.run_dir)
    run.make()
    plan = make_plan(topology, None)
    ours = [
        *(topology.shm_dir / f"ds-{topology.digest}-{name}" for name in ("decode-0.kv", "relay-n0.keep")),
        *(run.path / name for name in ("decode-0.ready", "decode-0.ranks.0a1b")),
    ]
    strangers = [topology.shm_dir / "ds-0123456789ab-decode-0.kv", topology.shm_dir / "other", run.path / "note"]
    for path in (*ours, *strangers):
        path.write_text("x")
    (sock,) = [path for path in ipc_paths(plan) if path.name == "relay-n0.sock"]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
    run.write(record(topology, process("decode-0", None, None)))
    told = leftovers.clean(run, plan)
    assert sorted(told) == sorted(f"removed {path}" for path in [*ours, sock])
    assert all(path.exists() for path in strangers)
    assert run.read() is None
    assert leftovers.clean(run, plan) == []


def test_clean_knows_the_segments_of_a_run_from_an_earlier_version_of_the_file(topology: Topology) -> None:
    run = RunDir(topology.run_dir)
    run.make()
    earlier = topology.shm_dir / "ds-0123456789ab-decode-0.kv"
    earlier.write_text("x")
    run.write(msgspec.structs.replace(record(topology, process("decode-0", None, None)), digest="0123456789ab"))
    (topology.run_dir / "decode-0.ready").write_text("1\n")
    told = leftovers.clean_record(run)
    assert told == [f"removed {earlier}", f"removed {topology.run_dir / 'decode-0.ready'}"]
    assert leftovers.clean_record(run) == []


def test_a_process_that_outlived_its_supervisor_is_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert leftovers.end(process("decode-0", sleeper.pid, start_ticks(sleeper.pid)))
    assert sleeper.wait(60) == -9


def test_a_process_that_only_got_the_same_pid_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks(sleeper.pid)
    assert ticks is not None
    assert not leftovers.end(process("decode-0", sleeper.pid, ticks - 1))
    assert not leftovers.end(process("decode-0", sleeper.pid, None))
    assert sleeper.poll() is None


def test_a_process_that_is_gone_is_no_leftover() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not leftovers.end(process("decode-0", gone.pid, 1))
    assert not leftovers.end(process("decode-0", None, None))
    assert start_ticks(gone.pid) is None
