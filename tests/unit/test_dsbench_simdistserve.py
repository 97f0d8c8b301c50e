"""Another simulator beside this one: a stand-in of it, run as a program; ours for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsbench.simdistserve import command
from dswire.errors import BadInput, StartFailed

#: what the driver uses of the real one: every request has its prompt's length as TTFT, and a TPOT of 50 ms
STAND_IN = """
import json


class Column(list):
    tolist = lambda self: list(self)


def parse_args(given):
    return dict(zip(given[::2], given[1::2]))


def main(given, found):
    assert given["--model"] == "facebook/opt-13b"
    assert (given["--tp-prefill"], given["--tp-decode"]) == ("1", "1")
    rows = json.load(open(given["--workload"]))
    assert len(rows) == int(given["--N"])
    assert rows[0]["start_time"] < rows[-1]["start_time"]
    print("chatter")
    table = {"first_token_latency": Column(row["prompt_len"] for row in rows), "tpot": Column([50.0] * len(rows))}
    found["per_request_latency_df"] = table
"""
OPTIONS = ["--prefill-tp", "1", "--workload", "fixed:300,20", "--requests", "60", "--rates", "2"]


def checkout(directory: Path, program: str) -> str:
    where = directory / "simdistserve" / "benchmarks"
    where.mkdir(parents=True)
    (where / "simulate_dist.py").write_text(program)
    return str(directory)


def test_both_simulators_tell_of_the_same_requests(tmp_path: Path) -> None:
    given = [checkout(tmp_path, STAND_IN), *OPTIONS]
    result = CliRunner().invoke(command, [*given, "--json"], catch_exceptions=False)
    theirs, ours = json.loads(result.stdout)
    assert (theirs["simulator"], theirs["ttft_p50_ms"], theirs["tpot_p90_ms"]) == ("simdistserve", 300.0, 50.0)
    # 300 ms are above the objective of 250
    assert theirs["attainment"] == 0.0
    assert ours["rate"] == 2.0
    assert 40 < ours["ttft_p50_ms"] < 250
    assert ours["attainment"] > 0.9
    shown = CliRunner().invoke(command, given, catch_exceptions=False)
    assert "this one" in shown.output


def test_what_does_not_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no simdistserve"):
        CliRunner().invoke(command, [str(tmp_path), *OPTIONS], catch_exceptions=False)
    path = checkout(tmp_path, "import a_library_that_is_not_there")
    with pytest.raises(StartFailed, match="No module named 'a_library_that_is_not_there'"):
        CliRunner().invoke(command, [path, *OPTIONS], catch_exceptions=False)
    with pytest.raises(StartFailed, match="did not run"):
        CliRunner().invoke(command, [path, *OPTIONS, "--python", "/no/python"], catch_exceptions=False)
    with pytest.raises(BadInput, match="'fast' is not understood"):
        CliRunner().invoke(command, [path, "--rates", "fast"], catch_exceptions=False)
