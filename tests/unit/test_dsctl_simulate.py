"""``dsctl simulate``: its options, its output, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsctl import __main__ as main
from dsctl.simulate import parse_slo
from dssim import plot
from dssim.wish import REQUESTS, Wish, make
from dstopology.resolved import Slo
from dswire.errors import BadInput, StartFailed
from support.topologies import Desk

SLO = Slo(ttft_s=0.25, tpot_s=0.06, attainment=0.9)
WISH = Wish("humaneval", 4.0, 20, "poisson", 1.0, 0)

#: a JSON file of something else
LENGTHS = Path(plot.__file__).with_name("lengths.json")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `dsctl simulate` on a small topology; gives exit status, output and errors."""
    desk = Desk(tmp_path)
    desk.model()
    path = desk.write("model: tiny\nkv: {blocks: 200}\n")
    for name, value in desk.env.items():
        monkeypatch.setenv(name, value)

    def simulate(*arguments: str) -> tuple[int, str, str]:
        status = main.run(["simulate", "-f", str(path), *arguments])
        told = capfd.readouterr()
        return status, told.out, told.err

    return simulate


def as_json(run: Run, *arguments: str) -> dict[str, Any]:
    status, out, _ = run("--json", *arguments)
    assert status == 0
    read: dict[str, Any] = json.loads(out)
    return read


def test_json_tells_all_figures_in_milliseconds(run: Run) -> None:
    told = as_json(run, "--workload", "fixed:100,11", "--rate", "1", "--requests", "4", "--arrival", "constant")
    # nobody waits for anybody: base, 100 tokens and their squares, and ways of 0.2 and 0.1 ms there and back
    assert told["ttft_ms"]["p50"]["value"] == pytest.approx(18.10 + 10.191 + 0.07122 + 0.6)
    assert told["requests"] == told["finished"] == 4
    assert told["attainment"]["value"] == 1.0
    assert told["attainment"]["low"] < 1.0
    assert told["ttft_ms"]["p99"]["high"] is None
    assert told["held_at_the_end"] == {}
    assert set(told["busy"]) == {"prefill-0", "decode-0"}
    assert told["slo"] == {"ttft_ms": 250, "tpot_ms": 60, "attainment": 0.9}


def test_the_same_seed_is_the_same_run_and_another_is_another(run: Run) -> None:
    def told(seed: int) -> Any:
        arguments = ("--workload", "humaneval", "--rate", "3", "--requests", "15", "--seed", str(seed))
        return as_json(run, *arguments)["total_ms"]

    assert told(1) == told(1)
    assert told(1) != told(2)


def test_people_get_a_verdict_and_tables(run: Run) -> None:
    workload = ("--workload", "fixed:64,8", "--rate", "2", "--requests", "5")
    status, out, err = run(*workload, "--slo", "ttft:1,tpot:100")
    assert (status, err) == (0, "")
    assert "0.0% of 5 requests" in out
    assert "wanted 90%: missed" in out
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["ms", "p50", "p90", "p95", "p99"]
    assert "met" in run(*workload, "--slo", "ttft:1000,tpot:100")[1]


def test_figures_say_whose_times_they_are_and_in_the_ledgers_words(run: Run) -> None:
    _, out, _ = run("--workload", "fixed:64,8", "--rate", "2", "--requests", "1")
    assert "times of steps: opt-13b-a100, published by DistServe; for those of tiny on this machine" in out
    assert "prefill: step " in out
    assert "decode: all further steps " in out
    # one request tells nothing of how far its times are from others
    assert "?" not in out
    assert "(from" not in out
    _, out, _ = run("--workload", "humaneval", "--rate", "2", "--requests", "20")
    assert "(from " in out.splitlines()[5]
    _, out, _ = run("--workload", "fixed:64,8", "--rates", "1,2", "--requests", "2")
    assert "up to 2 requests/s, the highest rate that was tried" in out
    assert max(len(line.rstrip()) for line in out.splitlines()[:4]) <= 80


def test_failed_requests_are_told_and_have_no_times(run: Run) -> None:
    _, out, _ = run("--workload", "fixed:4000,8", "--rate", "2", "--requests", "3")
    assert "3 requests failed: prompt_too_long" in out
    assert "p50" not in out
    _, out, _ = run("--workload", "fixed:4000,8", "--rate", "2", "--requests", "1")
    assert "1 request failed: prompt_too_long" in out


def test_a_run_without_an_answer_ends_with_a_status_of_its_own(run: Run) -> None:
    # no pool is so large
    status, out, _ = run("--json", "--workload", "fixed:100000,11", "--rate", "1", "--requests", "2")
    assert (status, json.loads(out)["finished"]) == (5, 0)
    assert run("--workload", "fixed:100000,11", "--rates", "1,2", "--requests", "2")[0] == 5


def test_a_file_with_arrivals_is_replayed_and_traced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("at_s,prompt_tokens,output_tokens\n0,32,3\n0.5,32,2\n")
    trace = tmp_path / "trace.json"
    told = as_json(run, "--workload", str(tmp_path / "w.csv"), "--trace", str(trace))
    assert told["requests"] == 2
    slices = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    # two prefill steps, three decode steps
    assert len(slices) == 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--workload", "alpaca", "--rate", "1"], "'alpaca' is not known"),
        (["--workload", "sharegpt"], "does not tell when"),
        (["--rate", "0"], "rate of 0"),
        (["--rate", "1", "--slo", "ttft=3"], "--slo"),
        (["--rate", "1", "--profile", "none.json"], "none.json cannot be read"),
        (["--rate", "1", "--profile", str(LENGTHS)], "is no profile"),
        (["--workload", "none.csv"], "none.csv cannot be read"),
        (["--rates", "1:2"], "rates '1:2'"),
        (["--rates", "3:2:1"], "not understood"),
        (["--rates", "1:2:0"], "not understood"),
        (["--rates", "0,1"], "not understood"),
        (["--rates", "1:2:1", "--rate", "3"], "--rates goes with neither"),
        (["--rate", "1", "--fail", "decode-3@1"], "no decode-3"),
        (["--rate", "1", "--requests", "1", "--trace", "/nowhere/t.json"], "/nowhere/t.json"),
    ],
)
def test_bad_input_is_refused_with_status_2(run: Run, arguments: list[str], word: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert word in err


def test_several_rates_make_a_curve(run: Run, tmp_path: Path) -> None:
    workload = ("--workload", "fixed:512,20", "--requests", "30", "--arrival", "constant")
    told = as_json(run, *workload, "--rates", "1:41:20")
    assert [one["rate"] for one in told["rates"]] == [1, 21, 41]
    shares = [one["attainment"]["value"] for one in told["rates"]]
    assert shares[0] == 1.0 > shares[-1]
    assert 1 <= told["goodput"] < 41
    if importlib.util.find_spec("matplotlib"):
        path = tmp_path / "curve.png"
        _, out, _ = run(*workload, "--rates", "1,41", "--plot", str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [line.split()[0] for line in out.splitlines()[2:4]] == ["1", "41"]
        assert "at least 90% of requests have TTFT within 250 ms" in out


def test_failures_are_injected_and_told(run: Run) -> None:
    workload = ("--workload", "fixed:64,50", "--rate", "2", "--requests", "8")
    told = as_json(run, *workload, "--fail", "decode-0@1.5s+0.5")
    assert told["failures"] == [
        {"at_s": pytest.approx(1.5), "name": "decode-0", "up": False},
        {"at_s": pytest.approx(2.0), "name": "decode-0", "up": True},
    ]
    assert (told["finished"], told["errors"]) == (8, {})
    assert told["retried"] > 0
    _, out, _ = run(*workload, "--fail", "decode-0@1.5+0.5")
    assert "decode-0 died at 1.5 s, decode-0 back at 2 s" in out


def test_a_model_of_unknown_shape_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("model: elsewhere\n")
    status, _, err = run("--rate", "1")
    assert status == 2
    assert "elsewhere is not on this host" in err


def test_plots_without_matplotlib_are_refused_before_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StartFailed):
        plot.check()
    status, out, err = run("--rate", "1", "--plot", "p.png")
    assert (status, out) == (StartFailed.exit_code, "")
    assert "distserve[plan]" in err


def test_plots_are_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.png"
    assert run("--rate", "4", "--requests", "5", "--workload", "fixed:64,8", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    status, _, err = run(
        "--rate", "4", "--requests", "5", "--workload", "fixed:64,8", "--plot", str(tmp_path / "p.x")
    )
    assert status == 2
    assert "cannot be written" in err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, (0.25, 0.06)),
        ("ttft:100", (0.1, 0.06)),
        ("tpot:12.5", (0.25, 0.0125)),
        ("tpot:50, ttft:100", (0.1, 0.05)),
    ],
)
def test_objectives_left_out_are_the_topologys(text: str | None, wanted: tuple[float, float]) -> None:
    slo = parse_slo(text, SLO)
    assert (slo.ttft_s, slo.tpot_s, slo.attainment) == (*wanted, 0.9)


@pytest.mark.parametrize("text", ["", "ttft:0", "ttft:-1", "ttft:1,ttft:2", "total:1", "ttft:1;tpot:2"])
def test_objectives_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--slo"):
        parse_slo(text, SLO)


def test_another_rate_asks_for_the_same_lengths() -> None:
    slow, fast = make(WISH), make(Wish("humaneval", 40.0, 20, "gamma", 3.0, 0))
    assert [(one.prompt_tokens, one.output_tokens) for one in slow] == [
        (one.prompt_tokens, one.output_tokens) for one in fast
    ]
    assert [one.at_s for one in slow] != [one.at_s for one in fast]


def test_what_has_no_end_is_cut() -> None:
    assert len(make(Wish("fixed:3,2", 1.0, None, "constant", 1.0, 0))) == REQUESTS


def test_a_file_gets_other_arrivals_where_a_rate_is_given(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"at_s": 7, "prompt_tokens": 3, "output_tokens": 2}\n' * 3)
    assert [one.at_s for one in make(Wish(str(path), None, 2, "constant", 1.0, 0))] == [7.0, 7.0]
    assert len(make(Wish(str(path), None, None, "constant", 1.0, 0))) == 3
    assert [one.at_s for one in make(Wish(str(path), 2.0, None, "constant", 1.0, 0))] == [0.5, 1.0, 1.5]
