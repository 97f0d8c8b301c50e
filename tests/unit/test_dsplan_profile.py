"""Measured profiles: fitted, kept, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsctl import __main__ as main
from dsplan.errors import ProfileMismatch
from dsplan.profile import Profile, ProfileLatency, Sample, Subject, check, check_topology, load
from dsplan.profile_fit import fit
from dsplan.profiling import BATCHES, CHUNKS, DECODE_BATCHES, MIXED, Spans, grid
from dssim.times import linear_times
from dstopology.load import load as load_topology
from dswire.errors import BadInput
from support.tiny_llama import make_model
from support.topologies import Desk

SUBJECT = Subject("this machine", "tiny", "f" * 64, "float32", 2)


def seconds(spans: Spans) -> float:
    """A machine that is just as the form has it, in milliseconds: large batches are cheaper from 16 on."""
    if all(tokens == 1 for _, tokens in spans):
        context = sum(start + tokens for start, tokens in spans)
        per_sequence = 1.5 if len(spans) < 16 else 1.0
        base = 12.0 if len(spans) < 16 else 22.0
        return (base + 0.004 * context + per_sequence * len(spans)) / 1e3
    tokens = sum(count for _, count in spans)
    squares = sum(count * count + 2 * count * start for start, count in spans)
    return (8.0 + 1.2 * tokens + 3e-4 * squares + 2.0 * len(spans)) / 1e3


def samples() -> list[Sample]:
    return [Sample(spans, seconds(spans), seconds(spans)) for spans in grid(2048, 128)]


def profile(subject: Subject = SUBJECT) -> Profile:
    made = Profile(subject, {1: samples()}, transfer={"copy_bytes_per_s": 2e9})
    made.fits[1] = fit(made.samples[1])
    return made


def test_the_fit_finds_the_machine() -> None:
    found = fit(samples())
    assert found["prefill"] == pytest.approx(
        {"base_ms": 8.0, "per_token_ms": 1.2, "per_square_ms": 3e-4, "per_sequence_ms": 2.0}, rel=1e-3
    )
    assert found["decode"] == pytest.approx(
        {"base_ms": 12.0, "per_token_ms": 0.004, "per_sequence_ms": 1.5}, rel=1e-3
    )
    assert found["decode_large"] == pytest.approx(
        {"base_ms": 22.0, "per_token_ms": 0.004, "per_sequence_ms": 1.0}, rel=1e-3
    )
    assert found["large_batch"] == 16
    assert found["errors"]["prefill"]["worst"] < 1e-3
    assert found["errors"]["decode"]["p90"] < 1e-3
    # steps of both are not fitted, only foretold: this machine has no form for them
    assert found["errors"]["mixed"]["points"] == len(MIXED)


def test_errors_are_of_what_was_not_seen() -> None:
    # one point in an otherwise perfect machine is wrong by half: the fit that lacks it says so
    made = [Sample(((0, length),), length / 1e3, length / 1e3) for length in range(100, 2100, 100)]
    made[7] = Sample(made[7].spans, made[7].seconds * 2, 0.0)
    decode = [one for one in samples() if one.decode]
    errors = fit([*made, *decode])["errors"]["prefill"]
    assert errors["points"] == 20
    assert errors["worst"] == pytest.approx(0.5, abs=0.05)


def test_no_coefficient_is_negative() -> None:
    # times that shrink with the batch: the form has no such machine, and the fit must not make one
    made = [Sample(((0, length),) * count, 1.0 / count, 1.0) for length in (64, 128, 256) for count in (1, 2, 4)]
    found = fit([*made, *(one for one in samples() if one.decode)])
    assert min(found["prefill"].values()) >= 0


def test_too_few_points_are_refused() -> None:
    with pytest.raises(BadInput, match="too few points"):
        fit(samples()[:3])


def test_the_grid_keeps_to_the_model_and_the_pool() -> None:
    whole = grid(4096, 128, 10**6)
    assert len(whole) == len(set(whole))
    kinds = (len(BATCHES), len(CHUNKS), len(DECODE_BATCHES), len(MIXED))
    assert len(whole) > sum(kinds)
    small = grid(256, 8, 1024)
    assert small
    for spans in small:
        assert len(spans) <= 8
        assert max(start + tokens for start, tokens in spans) <= 256
        assert sum(start + tokens for start, tokens in spans) <= 1024


def test_a_profile_is_what_simulator_and_planner_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    read = load(path)
    assert (read.subject, read.samples) == (SUBJECT, profile().samples)
    times = linear_times(str(path), 1)
    steps: list[tuple[int, ...]] = [(100,), (300, 50)]
    latency = ProfileLatency(path, read)
    one = latency.instance(1, 1)
    for lengths in steps:
        squares = sum(length * length for length in lengths)
        wanted = times.prefill_s(lengths)
        assert one.prefill_stage_s(sum(lengths), squares, len(lengths)) == pytest.approx(wanted)
    for batch in (3, 40):
        assert one.decode_step_s(batch, batch * 200) == pytest.approx(times.decode_s([200] * batch))
    assert latency.instance(1, 2).prefill_stage_s(100, 10_000, 1) == pytest.approx(times.prefill_s([100]) / 2)
    assert "tiny" in latency.source
    with pytest.raises(ProfileMismatch, match="TP 2"):
        latency.instance(2, 1)


@pytest.mark.parametrize("field", ["machine", "model", "fingerprint", "dtype", "threads"])
def test_a_profile_of_something_else_is_refused(tmp_path: Path, field: str) -> None:
    wanted: Any = 3 if field == "threads" else "another"
    with pytest.raises(ProfileMismatch, match=f"{field} .*, not {wanted}"):
        check(tmp_path / "p.json", SUBJECT, {field: wanted})


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not JSON"), ("[]", "no profile"), ('{"format": 9}', "no profile"), ('{"format": 1}', "damaged")],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=word):
        load(path)
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path)


def test_the_simulator_takes_the_topologys_profile_only(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.model()
    topology = load_topology(desk.write("model: {path: tiny, dtype: float32}\n"), desk.env)
    threads = topology.instances[0].threads
    path = tmp_path / "p.json"
    good = Subject("elsewhere", "tiny", "f", "float32", threads)
    profile(good).save(path)
    check_topology(path, topology)
    for wrong in (
        Subject("elsewhere", "huge", "f", "float32", threads),
        Subject("elsewhere", "tiny", "f", "bfloat16", threads),
        Subject("elsewhere", "tiny", "f", "float32", threads + 1),
    ):
        profile(wrong).save(path)
        with pytest.raises(ProfileMismatch):
            check_topology(path, topology)


def test_a_profile_is_measured_and_goes_on_where_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "tiny")
    (model / "tokenizer.json").write_text("{}")  # has to be there, is not read
    path = tmp_path / "p.json"
    arguments = [
        "profile",
        "--model",
        str(model),
        "--dtype",
        "float32",
        "-o",
        str(path),
        "--point-seconds",
        "0.001",
    ]
    arguments += ["--max-model-len", "128", "--most-tokens", "256"]

    assert main.run([*arguments, "--json"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert first["tp"]["1"]["prefill"].keys() >= {"base_ms", "per_token_ms"}
    measured = load(path)
    del measured.samples[1][5:]
    measured.save(path)
    assert main.run(arguments) == 0
    assert "saturate" in capfd.readouterr().out
    again = load(path)
    assert again.samples[1][:5] == measured.samples[1]
    assert [one.spans for one in again.samples[1]] == grid(128, 128, 256)

    # two ranks, of which the other is a process of its own
    assert main.run([*arguments, "--tp", "2", "--json"]) == 0
    assert set(json.loads(capfd.readouterr().out)["tp"]) == {"1", "2"}
    assert {tp: len(samples) for tp, samples in load(path).samples.items()} == dict.fromkeys(
        (1, 2), len(again.samples[1])
    )

    assert main.run([*arguments, "--dtype", "bfloat16"]) == ProfileMismatch("").exit_code
    assert "dtype float32, not bfloat16" in capfd.readouterr().err
    assert main.run([*arguments, "-f", "t.yaml"]) == BadInput("").exit_code
