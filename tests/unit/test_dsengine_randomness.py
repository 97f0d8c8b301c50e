"""The random numbers are fixed for ever, even, and independent of each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsengine.randomness import uniform

INTEGERS = st.integers(-(2**70), 2**70)


def test_golden() -> None:
    # Do not change these numbers: sequences in flight would come out differently on a newer instance.
    assert [uniform(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (-1, 7), (2**63, 2047))] == [
        0.6524484863740322,
        0.7012121095215252,
        0.36818951565166946,
        0.7238582745899125,
        0.9118228334191291,
    ]


@given(INTEGERS, st.integers(0, 2**31))
def test_range_and_grid(seed: int, position: int) -> None:
    u = uniform(seed, position)
    assert 0 <= u < 1
    assert (u * 2**53).is_integer()


@given(INTEGERS)
def test_low_64_bits_of_the_seed_count(seed: int) -> None:
    assert uniform(seed, 3) == uniform(seed + 2**64, 3)


def test_numbers_are_even_over_positions_and_seeds() -> None:
    for numbers in ([uniform(7, i) for i in range(4000)], [uniform(i, 7) for i in range(4000)]):
        tenths = [0] * 10
        for u in numbers:
            tenths[int(u * 10)] += 1
        # 400 expected, standard deviation 19
        assert all(300 < count < 500 for count in tenths)


def test_neighbouring_seeds_and_positions_share_no_number() -> None:
    numbers = {uniform(seed, position) for seed in range(60) for position in range(60)}
    assert len(numbers) == 3600
