"""Times of steps and transfers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssim.times import SHIPPED, FlatTransfer, Linear, LinearTimes, linear_times, transfer_times
from dswire.errors import BadInput

lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=100)


@given(lengths)
def test_a_step_takes_base_tokens_squares_and_sequences(lengths: list[int]) -> None:
    wanted = 1 + 0.5 * sum(lengths) + 0.25 * sum(n**2 for n in lengths) + 2 * len(lengths)
    assert Linear(1, 0.5, 0.25, 2).seconds(lengths) == pytest.approx(wanted)


@given(lengths)
def test_large_batches_of_decode_have_a_fit_of_their_own(lengths: list[int]) -> None:
    times = LinearTimes(Linear(1), Linear(2), Linear(3), large_batch=10)
    assert times.prefill_s(lengths) == 1
    assert times.decode_s(lengths) == (3 if len(lengths) >= 10 else 2)


def test_the_shipped_profile_is_the_published_one() -> None:
    times = linear_times("opt-13b-a100", 1)
    assert times.prefill_s([512, 100]) == pytest.approx(0.01810 + 1.0191e-4 * 612 + 7.122e-9 * (512**2 + 100**2))
    assert times.decode_s([300] * 94) == pytest.approx(0.01993 + 6.269e-7 * 300 * 94 + 3.851e-5 * 94)
    assert times.decode_s([300] * 95) == pytest.approx(0.007166 + 5.798e-7 * 300 * 95 + 1.5831e-4 * 95)


@pytest.mark.parametrize("name", SHIPPED)
def test_more_ranks_are_faster(name: str) -> None:
    taken = [linear_times(name, tp).prefill_s([1000]) for tp in (1, 2, 4)]
    assert taken == sorted(taken, reverse=True)
    assert transfer_times(name).network_s(25 * 10**9) == pytest.approx(8)


def test_a_bandwidth_of_nought_takes_no_time() -> None:
    free = FlatTransfer(seal_bytes_per_s=0, copy_bytes_per_s=10)
    assert (free.seal_s(100), free.copy_s(100)) == (0, 10)
    assert free.message_s(True) < free.message_s(False)


def test_a_profile_without_transfers_has_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"tp": {"1": {"prefill": {"base_ms": 3}, "decode": {"base_ms": 2}}}}))
    assert linear_times(str(path), 1) == LinearTimes(Linear(0.003), Linear(0.002))
    assert transfer_times(str(path)) == FlatTransfer()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not list"),
        ("{}", "is no profile: it has no times"),
        ('{"tp": {}, "samples": {"2": [1]}}', "is not complete yet"),
        ('{"tp": {"1": {}}}', "only for tp 1"),
        ('{"tp": {"2": []}}', "tp 2"),
        ('{"tp": {"2": {"prefill": {"base_ms": 1}}}}', "'decode'"),
        ('{"tp": {"2": {"prefill": {"base_ms": 1}, "decode": {"base": "x"}}}}', "tp 2"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=word):
        linear_times(str(path), 2)


@pytest.mark.parametrize("told", ['{"copy_bytes_per_s": -1}', '{"speed": 1}', "[]", '{"seal_bytes_per_s": "x"}'])
def test_wrong_transfers_are_refused(tmp_path: Path, told: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(f'{{"transfer": {told}}}')
    with pytest.raises(BadInput, match="transfer"):
        transfer_times(str(path))


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read") as refused:
        linear_times(str(tmp_path / "none.json"), 1)
    assert SHIPPED[0] in refused.value.remedy
