"""What is left to chance: drawn by the simulator, and found again from ledgers alone."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dsbench.noise import factors, told
from dssim.noise import Noisy
from dssim.profiled import express, system_of
from dssim.records import Record
from dssim.times import linear_times, noise
from dssim.wish import Wish, make
from dstopology.load import load
from dstopology.resolved import Topology
from dswire.errors import BadInput
from support.topologies import Desk

FIT = {
    "prefill": {"base_ms": 8.0, "per_token_ms": 1.0},
    "decode": {"base_ms": 10.0, "per_token_ms": 0.004, "per_sequence_ms": 0.5},
}
#: one step of ten halts
HALTS = {"prefill": [1.0] * 9 + [3.0], "decode": [1.0] * 9 + [4.0]}
ARRIVALS = make(Wish("fixed:60,20", 4.0, 300, seed=3))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path)
    desk.model()
    for name, value in desk.env.items():
        monkeypatch.setenv(name, value)
    return desk


def topology(desk: Desk, more: str = "") -> Topology:
    return load(desk.write(f"model: tiny\nkv: {{blocks: 600}}\n{more}"), desk.env)


def profile(directory: Path, **more: Any) -> str:
    path = directory / "p.json"
    path.write_text(json.dumps({"tp": {"1": FIT}, **more}))
    return str(path)


def records(one: Topology, path: str, seed: int = 0) -> tuple[Record, ...]:
    return system_of(one, path, seed=seed).run(ARRIVALS).records


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("mode", ["", "mode: colocated\n"])
def test_what_halts_steps_is_found_from_the_ledgers(desk: Desk, tmp_path: Path, mode: str) -> None:
    here = topology(desk, mode)
    real = records(here, profile(tmp_path, noise=HALTS))
    calm = profile(tmp_path)
    times = linear_times(calm, 1)
    found = factors(real, records(here, calm), times)
    assert mean(found["prefill"]) == pytest.approx(1.2, rel=0.1)
    assert max(found["prefill"]) > 2.5
    if not mode:
        assert mean(found["decode"]) == pytest.approx(1.3, rel=0.15)
        for phase, part in found.items():
            assert sorted(part)[len(part) // 2] == pytest.approx(1.0, abs=0.03), phase
    # a system that is as foretold leaves nothing to chance
    assert factors(real, real, times) == {phase: pytest.approx([1.0] * len(found[phase])) for phase in found}
    assert told({"prefill": [1.0], "decode": [2.0]}) == "prefill 1.00/1.00/1.00/1.00, decode 2.00/2.00/2.00/2.00"
    assert factors([], real, times) == {}


def test_chance_is_the_same_for_the_same_seed_and_no_other(desk: Desk, tmp_path: Path) -> None:
    here, path = topology(desk), profile(tmp_path, noise=HALTS)
    assert records(here, path) == records(here, path)
    assert records(here, path) != records(here, path, seed=1)
    # what is compiled knows no chance
    assert express(here, path, ARRIVALS) is None


def test_a_phase_without_chance_is_as_foretold(tmp_path: Path) -> None:
    calm = linear_times(profile(tmp_path), 1)
    noisy = Noisy(calm, {"decode": [2.0]}, Random(0))
    assert noisy.decode_s([10]) == noisy.mixed_s([], [10]) == 2 * calm.decode_s([10])
    # no chance in reading was told
    assert noisy.prefill_s([10]) == calm.prefill_s([10])
    assert noisy.mixed_s([(0, 10)], [5]) == calm.mixed_s([(0, 10)], [5])


@pytest.mark.parametrize(
    "told",
    [[1], {"prefill": 1}, {"prefill": [0.0]}, {"prefill": []}, {"decode": ["x"]}, {"decode": [float("inf")]}],
)
def test_noise_that_is_none_is_refused(tmp_path: Path, told: Any) -> None:
    with pytest.raises(BadInput, match="noise"):
        noise(profile(tmp_path, noise=told))
    assert noise(profile(tmp_path)) == {}
