"""When a sequence is over."""

from __future__ import annotations

import pytest

from dssched.finish import finish_reason
from dswire.messages.client import Sampling

EOS = frozenset({0, 1})


@pytest.mark.parametrize(
    ("token", "made", "sampling", "reason"),
    [
        (7, 1, Sampling(max_tokens=5), ""),
        (7, 5, Sampling(max_tokens=5), "length"),
        (0, 1, Sampling(max_tokens=5), "stop"),
        (1, 5, Sampling(max_tokens=5), "stop"),
        (0, 1, Sampling(max_tokens=5, ignore_eos=True), ""),
        (0, 5, Sampling(max_tokens=5, ignore_eos=True), "length"),
        (7, 2, Sampling(max_tokens=5, stop_token_ids=(7,)), "stop"),
        (7, 2, Sampling(max_tokens=5, stop_token_ids=(7,), ignore_eos=True), "stop"),
        # they do not count before min_tokens
        (0, 3, Sampling(max_tokens=5, min_tokens=3), ""),
        (0, 4, Sampling(max_tokens=5, min_tokens=3), "stop"),
        (7, 3, Sampling(max_tokens=5, min_tokens=3, stop_token_ids=(7,)), ""),
        (0, 5, Sampling(max_tokens=5, min_tokens=5), "length"),
    ],
)
def test_the_reason(token: int, made: int, sampling: Sampling, reason: str) -> None:
    assert finish_reason(token, made, sampling, EOS) == reason
