"""Prediction beside measurement: the probe against a system whose costs are known, the comparison, the knee."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from msgspec import structs
from rich.console import Console

from dsbench import calibrate, calibration, compared, predict
from dsbench.__main__ import cli
from dsbench.calibration import Calibration
from dsbench.compared import Compared
from dsbench.contention import find
from dsbench.disturbance import Disturbance
from dsbench.load import Progress
from dsbench.predict import Prediction
from dsbench.probe import OUTPUT, OUTPUTS, SHORT, SINGLES, Constants, Seen, constants
from dsbench.serve import Measurement
from dsbench.served import Served, serve_figures
from dsclient import Completion, Usage
from dskv.layout import KvLayout
from dsplan.profile import Profile, Subject
from dssim.profiled import system_of
from dssim.records import Record
from dssim.statistics import Estimate
from dssim.times import linear_times
from dssim.wish import Wish, make
from dssim.workload import Arrival
from dstopology.load import load
from dstopology.resolved import Slo, Topology
from dswire.errors import BadInput, Failed
from support.topologies import Desk

SLO = Slo(ttft_s=0.25, tpot_s=0.06, attainment=0.9)
#: a system as a probe may find it; the engine alone is the same without overhead
ENGINE = {
    "prefill": {"base_ms": 8.0, "per_token_ms": 1.0, "per_square_ms": 1e-4},
    "decode": {"base_ms": 10.0, "per_token_ms": 0.004, "per_sequence_ms": 1.5},
}
OVERHEAD = {"prefill": {"base_ms": 3.0}, "decode": {"base_ms": 0.7, "per_sequence_ms": 0.2}}
TRANSFER = {
    "local_message_s": 3e-4,
    "network_message_s": 5e-4,
    "seal_bytes_per_s": 2e8,
    "copy_bytes_per_s": 1e8,
    "network_bytes_per_s": 1e9,
}


@pytest.fixture
def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Topology:
    """A small system."""
    desk = Desk(tmp_path)
    desk.model()
    path = desk.write("model: tiny\nkv: {blocks: 600}\n")
    for name, value in desk.env.items():
        monkeypatch.setenv(name, value)
    return load(path, desk.env)


def profile(directory: Path, name: str, **more: Any) -> Path:
    path = directory / name
    fit = ENGINE | ({"overhead": OVERHEAD} if more.pop("whole", False) else {})
    path.write_text(json.dumps({"tp": {"1": fit}, "transfer": TRANSFER, **more}))
    return path


def answers(topology: Topology, path: Path, arrivals: list[Arrival]) -> list[Completion]:
    """What a client of the simulated system gets."""
    records = sorted(system_of(topology, str(path)).run(arrivals).records, key=lambda one: one.number)
    made = []
    for one in records:
        assert one.ledger is not None
        assert one.first_s is not None
        usage = Usage(one.prompt_tokens, one.output_tokens)
        made.append(Completion("r", (), usage, one.ledger, one.first_s, one.total_s))
    return made


def seen(topology: Topology, path: Path) -> Seen:
    """The probe, asked of the simulator."""
    alone = {
        length: answers(topology, path, [Arrival(5.0 * number, length, OUTPUT) for number in range(count)])
        for length, count in SINGLES
    }
    together = answers(topology, path, [Arrival(0.0, SHORT, output) for output in OUTPUTS])
    # of one turn in a slow moment
    slow = [
        structs.replace(one, ledger=structs.replace(one.ledger, decode_s=2 * one.ledger.decode_s))
        for one in together
    ]
    return Seen(1, alone, [together, slow, together])


def test_the_probe_finds_the_costs_of_a_known_system(topology: Topology, tmp_path: Path) -> None:
    whole = profile(tmp_path, "whole.json", whole=True)
    engine = linear_times(str(profile(tmp_path, "engine.json")), 1)
    asked = seen(topology, whole)
    layout = layout_of(topology)
    found = constants(asked, engine, layout)
    for name in ("local_message_s", "network_message_s"):
        assert found.transfer[name] == pytest.approx(TRANSFER[name], rel=0.01)
    for name in ("seal_bytes_per_s", "copy_bytes_per_s"):
        assert found.transfer[name] == pytest.approx(TRANSFER[name], rel=0.05)
    assert found.overhead["prefill"]["base_ms"] == pytest.approx(3.0, rel=0.01)
    assert found.overhead["decode"]["base_ms"] == pytest.approx(0.7, abs=0.1)
    assert found.overhead["decode"]["per_sequence_ms"] == pytest.approx(0.2, abs=0.05)
    with pytest.raises(Failed, match="no answers"):
        constants(replace(asked, together=[]), engine, layout)


@pytest.mark.parametrize("factors", [{}, {"prefill": 1.3, "decode": 1.2}, {"decode": 1.5}])
def test_under_load_it_is_found_how_much_instances_slow_each_other_down(
    topology: Topology, tmp_path: Path, factors: dict[str, float]
) -> None:
    arrivals = make(Wish("fixed:60,20", 5.0, 80, seed=3))
    real = (
        system_of(topology, str(profile(tmp_path, "real.json", whole=True, beside=factors))).run(arrivals).records
    )

    def predict(factors: dict[str, float]) -> tuple[Record, ...]:
        path = profile(tmp_path, "guess.json", whole=True, beside=factors)
        return system_of(topology, str(path)).run(arrivals).records

    engine = linear_times(str(profile(tmp_path, "engine.json")), 1)
    found = find(real, predict, engine)
    assert found["prefill"] == pytest.approx(factors.get("prefill", 1.0), abs=0.03)
    assert found["decode"] == pytest.approx(factors.get("decode", 1.0), abs=0.03)
    with pytest.raises(Failed, match="nothing of the load"):
        find([replace(one, ledger=None) for one in real], predict, engine)


def layout_of(topology: Topology) -> KvLayout:
    from dssim import model

    return model.layout_of(topology)


def test_the_knee_is_where_attainment_falls_below_what_is_wanted(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "REQUESTS", 60)
    prediction = Prediction(topology, profile(tmp_path, "p.json", whole=True), SLO)
    wish = Wish("fixed:60,20", None)
    knee = prediction.knee(wish)
    at, above = (prediction.attainment(replace(wish, rate=knee * factor, requests=60)) for factor in (1.0, 1.1))
    assert at >= SLO.attainment > above
    with pytest.raises(BadInput, match="at any rate"):
        Prediction(topology, prediction.profile, replace(SLO, ttft_s=0.01)).knee(wish)


@pytest.mark.parametrize(
    ("said", "knees", "loads"),
    [
        (None, [10.0, 9.5], [9.0]),
        (None, [17.0, 12.5, 12.0], [15.3, 11.25]),
        (None, [17.0, 12.5, 9.0], [15.3, 11.25]),
        (10.0, [], [9.0]),
    ],
)
def test_a_first_load_that_was_too_much_is_followed_by_another(
    topology: Topology,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: float | None,
    knees: list[float],
    loads: list[float],
) -> None:
    plan = calibration.Plan(1, 0.0, 0.05, 1)
    one = Calibration(topology, tmp_path / "p.json", SLO, Wish("fixed:60,20", None), plan, Console())
    foretold, tried = iter(knees), list[float]()

    def reference(_: object, __: object, rate: float, ___: int) -> str:
        tried.append(rate)
        return f"at {rate}"

    monkeypatch.setattr(Calibration, "knee", lambda _: next(foretold))
    monkeypatch.setattr(Calibration, "reference", reference)
    monkeypatch.setattr(Calibration, "learn", lambda *_: None)
    made: Any = one.begin(cast("Any", None), cast("Any", None), said)
    assert tried == pytest.approx(loads)
    assert made == (tried[-1], knees[-1] if knees else said, f"at {tried[-1]}")
    assert not list(foretold)


def served(ttft_s: float, tpot_s: float, slow: int = 0) -> Served:
    records = [
        Record(n, float(n), 10, 11, ttft_s, (ttft_s if n >= slow else 9.0) + 10 * tpot_s, "", None)
        for n in range(20)
    ]
    return serve_figures(records, SLO, 0.0, 1.0, 0.0)


def test_what_misses_its_aim_is_told() -> None:
    good = Compared("t", 1.0, served(0.1, 0.02), served(0.105, 0.021))
    bad = Compared("t", 2.0, served(0.1, 0.02), served(0.15, 0.02, slow=2))
    assert all(compared.within(good).values())
    told = compared.within(bad)
    assert not told["attainment"]
    assert not told["TTFT p50"]
    assert told["TPOT p50"]
    assert bad.points == pytest.approx(0.1)
    console = Console(width=200, record=True)
    compared.show(console, [good, bad], SLO)
    text = console.export_text()
    assert "100.0% / 90.0% +10.0" in text
    assert "100 / 150 -33%" in text
    assert "attainment 1 of 2" in text
    plain = json.loads(json.dumps(compared.plain([good, bad], SLO)))
    assert plain[1]["off"]["TTFT p50"] == pytest.approx(-1 / 3)
    assert plain[0]["within"] == dict.fromkeys(plain[0]["within"], True)


def test_what_chance_may_explain_is_told_from_what_it_cannot() -> None:
    sure = served(0.1, 0.02)
    wide = replace(sure, ttft_s={50: Estimate(0.2, 0.19, 0.21), 99: Estimate(0.2, 0.09, 0.6)})
    row = Compared("t", 1.0, sure, wide)
    assert not row.possible("ttft_s", 50)
    assert row.possible("ttft_s", 99)
    assert row.possible("tpot_s", 99)
    (plain,) = compared.plain([row], SLO)
    assert plain["possible"] == {"TTFT p50": False, "TTFT p99": True, "TPOT p50": True, "TPOT p99": True}
    assert not plain["within"]["TTFT p99"]
    console = Console(width=200, record=True)
    compared.show(console, [row], SLO)
    told = "in the 95 % interval of the measured: attainment 1 of 1, TTFT p50 0 of 1, TTFT p99 1 of 1"
    assert told in console.export_text()


def test_the_comparison_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Compared("t", rate, served(0.1, 0.02), served(0.1, 0.02)) for rate in (1.0, 2.0)]
    compared.save(rows, tmp_path / "truth.png")
    assert (tmp_path / "truth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="cannot be written"):
        compared.save(rows, tmp_path / "truth.x")


@pytest.mark.parametrize("rates", ["", "a", "0", "1,-2", "inf"])
def test_rates_that_are_none_are_refused(topology: Topology, rates: str) -> None:
    done = CliRunner().invoke(cli, ["calibrate", "-f", str(topology.path), "--rates", rates])
    assert isinstance(done.exception, BadInput)
    assert "--rates" in str(done.exception)


class Calm:
    """A machine that lets every other load alone."""

    watched = 0

    def __init__(self, roots: list[int]) -> None:
        assert os.getpid() in roots

    def end(self) -> Disturbance:
        Calm.watched += 1
        return Disturbance(0.2 * (Calm.watched % 2), 0.0, None)


def test_a_system_that_is_as_simulated_is_foretold_at_five_rates(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "measured.json"
    measured = Profile(Subject("here", "tiny", "f", topology.model.dtype, topology.instances[0].threads))
    measured.fits[1] = dict(ENGINE)
    measured.save(path)
    truth = profile(tmp_path, "truth.json", whole=True, beside={"prefill": 1.2, "decode": 1.1})

    def real(measurement: Measurement, console: Console) -> tuple[Served, Progress]:
        records = system_of(topology, str(truth)).run(measurement.load.arrivals).records
        figures = serve_figures(records, measurement.slo, measurement.warmup_s, measurement.offered_per_s, 0.0)
        return figures, Progress(len(records), records=list(records))

    monkeypatch.setattr(predict, "REQUESTS", 30)
    monkeypatch.setattr(calibration, "DRAWS", 1)
    monkeypatch.setattr(calibration, "started", lambda path, console: nullcontext())
    monkeypatch.setattr(calibrate, "profile_of", lambda *_: (path, measured))
    monkeypatch.setattr(Calibration, "probe", lambda *_: Constants(TRANSFER, OVERHEAD))
    monkeypatch.setattr(calibration, "measure", real)
    monkeypatch.setattr(calibration, "Watch", Calm)
    arguments = [
        "-f",
        str(topology.path),
        "--workload",
        "fixed:40,5",
        "--duration",
        "2",
        "--warmup",
        "1",
        "--rounds",
        "2",
    ]
    arguments += ["--goodput", "ttft:150 tpot:50"]
    done = CliRunner().invoke(cli, ["calibrate", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert len(rows) == 5
    # a hair's breadth in the factors moves one request of some 30 across an objective
    assert all(abs(row["attainment_points"]) < 150 / row["measured"]["requests"] for row in rows)
    assert all(ok for row in rows for figure, ok in row["within"].items() if figure != "attainment")
    assert [row["rate"] for row in rows] == sorted(row["rate"] for row in rows)
    # the first is below the knee, the last above it
    assert rows[0]["measured"]["attainment"]["value"] > 0.9 > rows[-1]["measured"]["attainment"]["value"]
    assert [[one["round"] for one in row["rounds"]] for row in rows] == [[1, 2]] * 5
    assert all(one["tries"] == 2 and one["steal"] == 0.0 for row in rows for one in row["rounds"])
    assert not any(one["disturbed"] for row in rows for one in row["rounds"])
    document = json.loads((tmp_path / "measured.t.json").read_text())
    assert document["beside"] == {"prefill": pytest.approx(1.2, abs=0.03), "decode": pytest.approx(1.1, abs=0.03)}
    assert document["tp"]["1"]["overhead"] == OVERHEAD
    text = CliRunner().invoke(cli, ["calibrate", *arguments, "--rates", "5"]).stdout
    assert "2 repetitions of 2 loads, 0 still disturbed" in text
