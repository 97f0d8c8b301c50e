"""Attainment, percentiles and their intervals."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssim.records import Record
from dssim.statistics import Estimate, percentile, percentiles, summarize, wilson
from dstopology.resolved import Slo
from dswire.messages.client import Ledger

SLO = Slo(ttft_s=0.2, tpot_s=0.1, attainment=0.9)


def record(first_s: float, total_s: float, tokens: int = 11, error: str = "") -> Record:
    ledger = None if error else Ledger(prefill_s=first_s, decode_s=total_s - first_s, total_s=total_s)
    return Record(0, 0.0, 5, tokens, None if error else first_s, total_s, error, ledger)


def test_wilson_gives_the_textbook_interval() -> None:
    found = wilson(8, 10)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(0, 0) == Estimate(0.0, 0.0, 1.0)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_within_all_and_nothing(count: int, share: float) -> None:
    hits = round(share * count)
    found = wilson(hits, count)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.sampled_from([1, 50, 90, 99]))
def test_a_percentile_is_of_the_sample_and_in_its_interval(values: list[float], percent: int) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert sum(one <= found.value for one in ordered) >= percent / 100 * len(ordered)
    assert sum(one < found.value for one in ordered) < percent / 100 * len(ordered)
    assert found.low <= found.value <= found.high


def test_percentile_intervals_hold_the_truth_about_95_times_in_100() -> None:
    random = Random(5)
    held = 0
    for _ in range(1000):
        found = percentile(sorted(random.random() for _ in range(200)), 90)
        held += found.low <= 0.9 <= found.high
    assert 930 <= held <= 985


def test_small_samples_do_not_tell_the_far_end() -> None:
    assert percentile([1.0, 2.0, 3.0], 99) == Estimate(3.0, 2.0, math.inf)
    assert percentiles([]) == {}


def test_attainment_is_joint_and_failed_requests_count_as_missed() -> None:
    records = [
        record(0.1, 0.6),  # both: 0.05 s a token
        record(0.3, 0.8),  # too late
        record(0.1, 2.1),  # too slow: 0.2 s a token
        record(0.1, 0.1, tokens=1),  # has no second token to wait for
        record(0.0, 9.0, error="overloaded"),
    ]
    summary = summarize(records, SLO, simulated_s=10.0)
    assert (summary.requests, summary.finished, summary.errors) == (5, 4, {"overloaded": 1})
    assert summary.attainment.value == pytest.approx(2 / 5)
    assert summary.ttft_attainment.value == pytest.approx(3 / 5)
    assert summary.tpot_attainment.value == pytest.approx(3 / 5)
    assert (summary.requests_per_s, summary.tokens_per_s) == (0.4, 3.4)
    assert summary.ttft_mean_s == pytest.approx(0.15)
    assert summary.tpot_mean_s == pytest.approx((0.05 + 0.05 + 0.2) / 3)
    assert summary.stages_s["prefill_s"] == pytest.approx(0.15)


def test_of_nothing_there_is_nothing_to_tell() -> None:
    summary = summarize([], SLO, simulated_s=0.0)
    assert (summary.requests, summary.ttft_s, summary.stages_s, summary.requests_per_s) == (0, {}, {}, 0.0)
