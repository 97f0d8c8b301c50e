"""What a soak takes for a leak, and how it looks at processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from dsbench.endured import ALLOWED_FILES, ALLOWED_NBYTES, Endured, Look
from dsbench.footprint import Footprint, footprint
from dsbench.soak import holds
from dswire.messages.client import StatusReport, WorkerStatus

ONE = Footprint(1 << 20, 20, 4)
LOOK = Look({"decode-0": ONE, "router-0": ONE}, 3, 0)
GOOD = Endured(100, 80, 9, {}, 2.0, LOOK, LOOK, {})


def grown(**change: int) -> Endured:
    return replace(GOOD, end=replace(LOOK, processes={"decode-0": replace(ONE, **change)}))


def test_what_grows_within_reason_is_no_leak() -> None:
    assert GOOD.failures == []
    most = grown(private_nbytes=ONE.private_nbytes + ALLOWED_NBYTES, files=ONE.files + ALLOWED_FILES, threads=1)
    assert most.failures == []


def test_every_kind_of_leak_is_told() -> None:
    assert grown(private_nbytes=ONE.private_nbytes + ALLOWED_NBYTES + (1 << 20)).failures == [
        "decode-0 grew by 17.0 MiB"
    ]
    assert grown(files=23).failures == ["decode-0 has 23 files open, and had 20"]
    assert grown(threads=5).failures == ["decode-0 has 5 threads, and had 4"]
    told = replace(
        GOOD,
        failed={"kv_corrupt": 2},
        held={"relay-n0: ready handles": 3},
        end=replace(LOOK, segments=4, restarts=1),
    )
    assert told.failures == [
        "2 requests failed with kv_corrupt",
        "3 relay-n0: ready handles are held for nobody",
        "shared memory has 4 files, and had 3",
        "processes died: 1 restarts",
    ]
    assert told.as_json()["failures"] == told.failures


def test_what_is_held_is_named() -> None:
    idle = WorkerStatus("decode-0", "decode", "n0", "up", 0, 0, 8, 0, {}, 9.0)
    busy = WorkerStatus("relay-n0", "relay", "n0", "up", 0, 2, 0, 0, {"ready": 1, "pulling": 0}, 9.0)
    report = StatusReport("router-0", "1", "m", 9.0, (idle, busy), {}, {"finished": 7})
    assert holds(report) == {"relay-n0: requests that run": 2, "relay-n0: ready handles": 1}


def test_files_memory_and_children_of_a_process_are_seen(tmp_path: Path) -> None:
    before = footprint(os.getpid())
    assert before.threads >= 1
    assert before.private_nbytes > 1 << 20
    with (tmp_path / "file").open("w"):
        assert footprint(os.getpid()).files >= before.files + 1
    command = [sys.executable, "-c", "b = bytearray(b'1') * (64 << 20); print('there', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert footprint(child.pid).private_nbytes > 64 << 20
        assert footprint(os.getpid()).private_nbytes > before.private_nbytes + (48 << 20)
        child.communicate(b"\n")
    assert footprint(child.pid) == Footprint()
