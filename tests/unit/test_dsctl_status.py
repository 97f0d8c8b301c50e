"""What `up` and `status` show, and the state of a system as others see it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from dsctl import overview as overview_module
from dsctl.__main__ import dsctl
from dsctl.overview import Overview
from dsctl.status import duration, table
from dsctl.supervise.board import Board
from dsctl.supervise.events import Note, Over
from dsctl.supervise.record import ProcessRecord, RunRecord
from dsctl.supervise.rundir import RunDir
from dswire.messages.client import StatusReport, WorkerStatus


def process(name: str, phase: str = "ready", **more: object) -> ProcessRecord:
    fresh = ProcessRecord(
        name=name,
        role=name.split("-")[0],
        node="n0",
        devices=("cpu:0",) if name.startswith(("prefill", "decode")) else (),
        phase=phase,
        step="",
        pid=100,
        start_ticks=1,
        restarts=0,
        started_at=1000.0,
        ready_at=1002.5 if phase == "ready" else None,
        crash="",
        crashed_at=None,
    )
    return msgspec.structs.replace(fresh, **more)


def record(*processes: ProcessRecord, topology: str = "/t.yaml") -> RunRecord:
    return RunRecord(
        pid=42,
        topology=topology,
        digest="0123456789ab",
        nodes=("n0",),
        shm_dir="/dev/shm",
        sockets=(),
        model="tiny",
        frontend="tcp://127.0.0.1:5555",
        keys_dir=None,
        ready_s=None,
        stopping=False,
        processes=processes,
    )


def worker(name: str, state: str = "up") -> WorkerStatus:
    raw = dict.fromkeys(WorkerStatus.__struct_fields__, 0) | {"name": name, "role": "decode", "node": "n0"}
    figures = {"state": state, "waiting": 1, "running": 2, "blocks": 91, "blocks_held": 30, "handles": {"ready": 3}}
    figures |= {"prompt_tokens": 240, "cached_tokens": 96}
    return msgspec.convert(raw | figures, WorkerStatus)


def report(*workers: WorkerStatus) -> StatusReport:
    return StatusReport(
        router="router-0",
        incarnation="a",
        model="tiny",
        uptime_s=5.0,
        workers=workers,
        requests={"decoding": 2},
        ended={"finished": 7, "failed": 0},
    )


UP = (process("relay-n0"), process("decode-0"), process("router-0"))


def shown(terminal: bool) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    return Board(Console(file=out, force_terminal=terminal, width=100, highlight=False)), out


def test_off_a_terminal_each_change_is_one_line() -> None:
    board, out = shown(terminal=False)
    board.show(record(process("decode-0", "starting")))
    board.show(record(process("decode-0", "starting")))
    board.show(record(process("decode-0", "starting", step="loading model")))
    board.show(record(process("decode-0", "down", restarts=0)))
    board.note(Note("decode-0", "warning", "killed by SIGKILL; starts again in 0.5 s"))
    board.show(record(process("decode-0", "starting", step="loading model", restarts=1)))
    board.ready(msgspec.structs.replace(record(process("decode-0", restarts=1)), ready_s=2.5))
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["decode-0: starting", "decode-0: loading model", "decode-0: down"]
    assert lines[3].endswith(" decode-0 killed by SIGKILL; starts again in 0.5 s")
    assert lines[4:] == [
        "decode-0: loading model (restart 1)",
        "decode-0: ready (restart 1)",
        "ready in 2.5 s: tiny at tcp://127.0.0.1:5555",
    ]
    board.show(msgspec.structs.replace(record(process("decode-0", "down", restarts=1)), ready_s=2.5))
    assert len(out.getvalue().splitlines()) == len(lines)


def test_on_a_terminal_the_table_ends_with_the_last_state() -> None:
    board, out = shown(terminal=True)
    board.show(record(process("decode-0", "starting", step="loading model")))
    board.ready(msgspec.structs.replace(record(*UP), ready_s=2.5))
    board.over(Over(0, None))
    board.close()
    text = out.getvalue()
    last = text[text.rindex("process") :]
    assert last.count("ready") == 4
    assert "2.5" in last
    # the cursor is given back
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("DS_RUN_DIR", str(tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    run.make()
    return run


def status(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    processes: tuple[ProcessRecord, ...],
    answer: StatusReport | None,
    *arguments: str,
) -> tuple[int, str]:
    """Exit status and output of ``dsctl status`` while a supervisor of ``processes`` runs."""
    file = run.path.with_name("t.yaml")
    monkeypatch.setattr(overview_module, "ask", lambda address, keys: (answer, "" if answer else "no answer"))
    with run.locked(file):
        run.write(record(*processes, topology=str(file)))
        done = CliRunner().invoke(dsctl, ["status", "-f", str(file), *arguments], standalone_mode=False)
    assert done.exception is None, done.output
    code: int = done.return_value
    return code, done.output


def test_all_up(running: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = status(running, monkeypatch, UP, report(worker("decode-0")))
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("decode-0")).split()
    assert row[1:3] == ["cpu:0", "ready"]
    assert row[-5:] == ["2", "30/91", "40%", "3", "ready"]
    assert "requests: 2 decoding; ended: 7 finished" in out


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    report_ = report(msgspec.structs.replace(worker("decode-0"), handles={}))
    rows = [overview_module.own_row(one, worker) for one in UP for worker in report_.workers]
    seen = Overview("/t.yaml", "tiny", "tcp://127.0.0.1:5555", 42, tuple(rows), report_, "")
    out = io.StringIO()
    Console(file=out, width=80).print(table(seen))
    assert "…" not in out.getvalue()
    assert "handles" not in out.getvalue()


def test_one_down(running: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = process("decode-0", "down", pid=None, crash="killed by SIGSEGV", crashed_at=1000.0)
    code, out = status(running, monkeypatch, (*UP[:1], crashed), report(worker("decode-0", "lost")))
    assert code == 5
    assert "down, lost" in out
    assert "killed by SIGSEGV" in out


def test_a_process_that_the_router_lost_is_down_even_when_it_exists(
    running: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = status(running, monkeypatch, UP, report(worker("decode-0", "lost")))
    assert code == 5
    assert "ready, lost" in out


def test_a_silent_router_is_down(running: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = status(running, monkeypatch, UP, None)
    assert code == 5
    assert "no answer" in out


def test_workers_of_other_hosts_are_shown_too(running: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = status(running, monkeypatch, UP, report(worker("decode-0"), worker("decode-1")), "--json")
    assert code == 0
    names = {one["name"]: one for one in json.loads(out)["processes"]}
    assert names["decode-1"]["pid"] is None
    assert names["decode-1"]["phase"] == "up"
    assert names["decode-0"]["worker"]["blocks_held"] == 30


def test_not_running(running: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    file = running.path.with_name("t.yaml")
    file.write_text("model: tiny\n")
    monkeypatch.setattr(overview_module, "ask", lambda address, keys: (None, "no answer"))
    done = CliRunner().invoke(dsctl, ["status", "-f", str(file)], standalone_mode=False)
    assert done.output == f"{file}: not running\n"
    assert done.return_value == 5


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (7.6, "8 s"), (600.0, "10 min"), (9000.0, "2.5 h")])
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
