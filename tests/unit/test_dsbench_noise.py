"""What is left to chance: drawn by the simulator, and found again from ledgers alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsbench.bootstrap import percentile
from dsbench.noise import Noise, find, told
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
#: for a few seconds of forty all steps take longer
SPELL = [(number / 10, 2.0 if number // 10 in (3, 4, 11, 22, 23, 24, 36, 37) else 1.0) for number in range(400)]
SPELLS = {"prefill": SPELL, "decode": SPELL}
ARRIVALS = make(Wish("fixed:60,20", 5.0, 200, seed=3))


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
def test_slow_spells_are_found_from_the_ledgers(desk: Desk, tmp_path: Path, mode: str) -> None:
    here = topology(desk, mode)
    real = records(here, profile(tmp_path, noise=SPELLS))
    times = linear_times(profile(tmp_path), 1)

    def predict(noise: Noise) -> tuple[Record, ...]:
        return records(here, profile(tmp_path, noise=noise), seed=1)

    found = find(real, predict, times, apart=not mode)
    reading = [factor for _, factor in found["prefill"]]
    assert mean(reading) == pytest.approx(1.2, rel=0.1)
    assert 1.8 < max(reading) < 2.5
    # slow steps follow upon slow ones
    slow = [factor > 1.5 for factor in reading]
    assert sum(a and b for a, b in pairwise(slow)) > 0.7 * sum(slow)
    asked, again, before = (tails(here, profile(tmp_path, noise=one)) for one in (SPELLS, found, {}))
    assert again == pytest.approx(asked, rel=0.15)
    assert all(calm < 0.7 * tail for calm, tail in zip(before, asked, strict=True))


def tails(here: Topology, path: str) -> list[float]:
    """TTFT and TPOT of runs that begin at different moments."""
    runs = [records(here, path, seed) for seed in range(3)]
    return [percentile(90)([getattr(one, name) for run in runs for one in run]) for name in ("ttft_s", "tpot_s")]


def test_a_system_that_is_as_foretold_leaves_nothing_to_chance(desk: Desk, tmp_path: Path) -> None:
    real = records(topology(desk), profile(tmp_path))
    times = linear_times(profile(tmp_path), 1)
    found = find(real, lambda noise: real, times)
    assert {phase: {factor for _, factor in steps} for phase, steps in found.items()} == {
        "prefill": {1.0},
        "decode": {1.0},
    }
    assert told({"prefill": [(0.0, 1.0)], "decode": [(1.0, 2.0)]}) == (
        "prefill 1.00/1.00/1.00/1.00, decode 2.00/2.00/2.00/2.00"
    )
    assert find([], lambda noise: real, times) == {}


def test_chance_is_the_same_for_the_same_seed_and_no_other(desk: Desk, tmp_path: Path) -> None:
    here, path = topology(desk), profile(tmp_path, noise=SPELLS)
    assert records(here, path) == records(here, path)
    assert records(here, path) != records(here, path, seed=1)
    # what is compiled knows no chance
    assert express(here, path, ARRIVALS) is None


def test_a_step_takes_as_long_as_the_one_that_was_measured_next_to_it(tmp_path: Path) -> None:
    calm, now = linear_times(profile(tmp_path), 1), 0.0
    noisy = Noisy(calm, {"decode": [(1.0, 2.0), (4.0, 3.0)]}, lambda: now)
    for at_s, factor in ((0.0, 2.0), (2.4, 2.0), (2.6, 3.0), (3.9, 3.0), (4.1, 2.0)):
        now = at_s
        assert noisy.decode_s([10]) == noisy.mixed_s([], [10]) == factor * calm.decode_s([10])
    later = Noisy(calm, noisy.noise, lambda: 0.0, begin=0.7)
    assert later.decode_s([10]) == 3.0 * calm.decode_s([10])
    # no chance in reading was told
    assert noisy.prefill_s([10]) == calm.prefill_s([10])
    assert noisy.mixed_s([(0, 10)], [5]) == calm.mixed_s([(0, 10)], [5])


@pytest.mark.parametrize(
    "told",
    [
        [1],
        {"prefill": 1},
        {"prefill": [1.0]},
        {"prefill": []},
        {"prefill": [[0, 0.0]]},
        {"decode": [[1, 1], [0, 1]]},
        {"decode": [["x", 1]]},
        {"decode": [[0, float("inf")]]},
    ],
)
def test_noise_that_is_none_is_refused(tmp_path: Path, told: Any) -> None:
    with pytest.raises(BadInput, match="noise"):
        noise(profile(tmp_path, noise=told))
    assert noise(profile(tmp_path)) == {}
