"""``dsbench kv`` on a few blocks: real relays, an owner in a process of its own, and the limits beside them."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from typing import Any

import pytest
from click.testing import CliRunner

from dsbench.handoff.ends import scattered
from dsbench.handoff.world import owning
from dsbench.kv import command

QUICK = ["--rounds", "1", "--mib", "2", "--handles", "20", "--no-system"]
TRANSFER = {"transport", "bytes", "curve", "seconds", "bytes_per_s", "limit_bytes_per_s", "ratio"}


def _rows(*arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(command, [*QUICK, *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ctrl_c_is_not_for_the_owner() -> None:
    with owning([sys.executable, "-c", "import sys; sys.stdin.read()"]) as process:
        assert os.getpgid(process.pid) != os.getpgrp()
    assert process.returncode == 0


def test_every_transport_beside_its_limit() -> None:
    rows = _rows("--curve", "--transport", "shm", "--transport", "host", "--transport", "gloo")
    moved = [row for row in rows if set(row) == TRANSFER]
    assert [(row["transport"], row["curve"]) for row in moved] == [
        ("copy", False),
        ("shm", False),
        ("host", False),
        ("host", True),
        ("gloo", False),
    ]
    for row in moved:
        assert row["bytes"] == 5 * 368_640
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["bytes_per_s"] / row["limit_bytes_per_s"])
    assert all(row["pull_us"] > 0 for row in rows if "pull_us" in row)
    assert all(row["handles"] == 20 and row["handles_per_s"] > 0 for row in rows if "handles" in row)
    (proof,) = (row for row in rows if "overhead" in row)
    assert proof["overhead"] == pytest.approx(proof["seconds"] / proof["seconds_unverified"] - 1)
    assert len(rows) == 5 + 1 + 2 * 4


def test_the_table_is_drawn() -> None:
    done = CliRunner().invoke(command, [*QUICK, "--transport", "shm"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "of the limit" in done.stdout
    assert "load average" in done.stderr


@pytest.mark.parametrize("wrong", [["--mib", "0"], ["--transport", "pigeon"], ["--handles", "1"]])
def test_wrong_options_are_refused(wrong: list[str]) -> None:
    assert CliRunner().invoke(command, wrong).exit_code == 2


@pytest.mark.parametrize("count", [1, 2, 5, 64, 182])
def test_scattered_blocks_are_each_there_once_and_far_from_each_other(count: int) -> None:
    order = scattered(count)
    assert sorted(order) == list(range(count))
    assert count < 6 or all(abs(one - other) > 1 for one, other in pairwise(order))
