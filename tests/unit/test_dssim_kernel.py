"""The simulator's clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dssim.kernel import Kernel


@given(st.lists(st.floats(0, 100), max_size=50))
def test_things_happen_in_order_of_time_and_then_of_scheduling(times: list[float]) -> None:
    kernel, seen = Kernel(), list[tuple[float, int]]()
    for number, when in enumerate(times):
        kernel.at(when, lambda number: seen.append((kernel.now, number)), number)
    while kernel.step():
        pass
    assert seen == sorted((when, number) for number, when in enumerate(times))
    assert kernel.steps == len(times)


def test_the_past_is_now() -> None:
    kernel, seen = Kernel(), list[float]()
    kernel.at(2.0, lambda: kernel.at(1.0, lambda: seen.append(kernel.now)))
    kernel.at(2.0, lambda: kernel.after(0.5, lambda: seen.append(kernel.now)))
    while kernel.step():
        pass
    assert seen == [2.0, 2.5]


def test_nothing_happens_in_an_empty_kernel() -> None:
    kernel = Kernel()
    assert not kernel.step()
    assert kernel.now == 0.0
