"""``dsbench serve`` starts a real system, loads it, and stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dstopology.endpoints import free_ports

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(300)]

YAML = """
model: {path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 128}
router: {frontend: "tcp://127.0.0.1:%d"}
prefill: {threads: 1}
decode: {threads: 1}
kv: {memory: 32MiB}
"""


def test_load_is_sent_counted_logged_and_replayed() -> None:
    with tempfile.TemporaryDirectory(prefix="ds-") as name:
        directory = Path(name)
        (directory / "t.yaml").write_text(YAML % free_ports())
        lengths = [(16, 4), (24, 2), (120, 20), (8, 3)]
        rows = (f"{0.1 * number},{prompt},{output}\n" for number, (prompt, output) in enumerate(lengths))
        (directory / "w.csv").write_text("at_s,prompt_tokens,output_tokens\n" + "".join(rows))
        command = ["-m", "dsbench", "serve", "-f", "t.yaml", "--start", "--workload", "w.csv", "--warmup", "0.05"]
        command += ["--goodput", "ttft:60000 tpot:60000", "--log", "log.jsonl", "--json"]
        env = {**os.environ, "DS_RUN_DIR": str(directory / "run"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=directory, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        # the first came before the warm-up's end
        assert (told["requests"], told["finished"], told["errors"]) == (3, 3, {})
        assert told["attainment"]["value"] == 1.0
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        # the third had no more room in the model than eight tokens
        assert [row["received_tokens"] for row in log] == [4, 2, 8, 3]
        assert [row["prompt_tokens"] for row in log] == [prompt for prompt, _ in lengths]
        assert all(row["ledger"]["ttft_s"] <= row["ttft_s"] <= row["total_s"] for row in log)
        again = subprocess.run(
            [sys.executable, "-m", "dsctl", "status", "-f", "t.yaml"], cwd=directory, env=env, capture_output=True
        )
        assert again.returncode != 0, "it still runs"


def test_a_load_that_is_never_answered_ends_with_a_status_of_its_own() -> None:
    with tempfile.TemporaryDirectory(prefix="ds-") as name:
        directory = Path(name)
        (directory / "t.yaml").write_text(YAML % free_ports())
        command = ["-m", "dsbench", "serve", "-f", "t.yaml", "--start", "--workload", "fixed:90,30", "--rate", "20"]
        # far less than one step takes
        command += ["--duration", "0.5", "--warmup", "0", "--request-timeout", "0.0001", "--json"]
        env = {**os.environ, "DS_RUN_DIR": str(directory / "run"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=directory, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 5, done.stderr
        told = json.loads(done.stdout)
        assert told["finished"] == 0 < told["requests"] == sum(told["errors"].values())


def test_nothing_stays_of_many_requests_some_of_which_are_left() -> None:
    with tempfile.TemporaryDirectory(prefix="ds-") as name:
        directory = Path(name)
        (directory / "t.yaml").write_text(YAML % free_ports())
        env = {**os.environ, "DS_RUN_DIR": str(directory / "run"), "OMP_NUM_THREADS": "1"}
        command = [
            "-m",
            "dsbench",
            "soak",
            "-f",
            "t.yaml",
            "--start",
            "--requests",
            "60",
            "--leave",
            "0.5",
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, *command, "--json"],
            cwd=directory,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["requests"], told["counted"], told["failed"], told["held"]) == (60, 48, {}, {})
        assert 10 < told["left"] < 50
        assert set(told["end"]["processes"]) == {"relay-n0", "prefill-0", "decode-0", "router-0"}
        assert told["failures"] == []
