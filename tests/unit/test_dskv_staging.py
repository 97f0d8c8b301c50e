"""Slots are free or owned by exactly one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskv.staging import StagingSlots, halves
from dswire.errors import BadInput


def test_slots_run_out_and_come_back() -> None:
    slots: StagingSlots[str] = StagingSlots(4, 2)
    assert [slots.take("a"), slots.take("b"), slots.take("c")] == [4, 5, None]
    assert slots.give(4) == "a"
    assert slots.take("c") == 4
    with pytest.raises(KeyError):
        slots.give(9)
    assert slots.owners == {5: "b", 4: "c"}


@given(st.lists(st.integers(0, 5)))
def test_random_takes_and_gives_stay_consistent(steps: list[int]) -> None:
    slots: StagingSlots[int] = StagingSlots(2, 4)
    for step in steps:
        if step in slots.owners:
            slots.give(step)
        else:
            full = slots.free == 0
            assert (slots.take(step) is None) == full
        slots.validate()
        assert slots.free + slots.held == 4


@pytest.mark.parametrize(("nbytes", "split"), [(8, (1, 1)), (15, (1, 2)), (512, (64, 64))])
def test_staging_is_split_in_halves(nbytes: int, split: tuple[int, int]) -> None:
    assert halves(nbytes, 4) == split


def test_staging_too_small_for_both_directions_is_refused() -> None:
    with pytest.raises(BadInput, match="no room for two slots"):
        halves(7, 4)
