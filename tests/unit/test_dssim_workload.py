"""Arrivals and lengths."""

from __future__ import annotations

import json
import statistics
from importlib.resources import files
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssim.workload import ARRIVALS, HISTOGRAMS, arrivals, fixed, gaps, histogram
from dswire.errors import BadInput

MANY = 20_000


@pytest.mark.parametrize(
    ("kind", "cv", "wanted_cv"),
    [("poisson", 9.0, 1.0), ("gamma", 0.5, 0.5), ("gamma", 2.0, 2.0), ("constant", 9.0, 0)],
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(kind: str, cv: float, wanted_cv: float) -> None:
    drawn = list(islice(gaps(kind, 4.0, Random(1), cv), MANY))
    mean = statistics.fmean(drawn)
    assert mean == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(drawn) / mean == pytest.approx(wanted_cv, rel=0.05)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_lengths_follow_the_histogram(name: str) -> None:
    document = json.loads(files("dssim").joinpath("lengths.json").read_text())
    width = document["limit_tokens"] / document["bins"]
    drawn = list(islice(histogram(name, Random(2)), MANY))
    for part, lengths in zip(("prompt", "output"), zip(*drawn, strict=True), strict=True):
        shares = document["workloads"][name][part]
        assert sum(shares) == pytest.approx(1, abs=0.01)
        assert 1 <= min(lengths) <= max(lengths) <= document["limit_tokens"]
        wanted = sum((place + 0.5) * width * share for place, share in enumerate(shares)) / sum(shares)
        assert statistics.fmean(lengths) == pytest.approx(wanted, rel=0.05)


@given(st.sampled_from(ARRIVALS), st.floats(0.01, 1000), st.integers(0, 50), st.integers())
def test_the_same_seed_gives_the_same_workload(kind: str, rate: float, count: int, seed: int) -> None:
    def make() -> list[tuple[float, int, int]]:
        random = Random(seed)
        made = arrivals(gaps(kind, rate, random, 1.5), histogram("humaneval", random), count)
        return [(one.at_s, one.prompt_tokens, one.output_tokens) for one in made]

    first = make()
    assert first == make()
    assert len(first) == count
    assert [at for at, _, _ in first] == sorted(at for at, _, _ in first)


def test_there_are_no_more_requests_than_lengths() -> None:
    made = arrivals(gaps("constant", 2.0, Random(0)), iter([(1, 2), (3, 4)]), 10)
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in made] == [(0.5, 1, 2), (1.0, 3, 4)]


def test_wrong_wishes_are_refused() -> None:
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(BadInput, match="rate"):
            gaps("poisson", rate, Random(0))
    with pytest.raises(BadInput, match="variation"):
        gaps("gamma", 1.0, Random(0), 0.0)
    with pytest.raises(BadInput, match="'bursty'"):
        gaps("bursty", 1.0, Random(0))
    with pytest.raises(BadInput, match="'alpaca'"):
        histogram("alpaca", Random(0))
    for prompt, output in ((0, 1), (1, 0)):
        with pytest.raises(BadInput, match="at least one token"):
            fixed(prompt, output)
