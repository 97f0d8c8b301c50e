"""Work that two threads share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Event, get_ident

import pytest

from dskv import memory
from dskv.memory import LARGE_NBYTES, side_by_side

COUNT = 50


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_who_begins_at_the_end_leaves_nothing_out_and_does_nothing_twice() -> None:
    done: list[tuple[int, int]] = []
    begun = {0: Event(), COUNT - 1: Event()}

    def work(places: Iterator[int]) -> None:
        for place in places:
            done.append((place, get_ident()))
            if place in begun:
                begun[place].set()
                assert begun[COUNT - 1 - place].wait(60.0)

    side_by_side(COUNT, LARGE_NBYTES, work)
    assert sorted(place for place, _ in done) == list(range(COUNT))
    threads = dict(done)
    assert threads[0] == get_ident() != threads[COUNT - 1]


def test_a_thread_that_is_busy_is_not_waited_for() -> None:
    free, busy = Event(), Event()

    def hold() -> None:
        busy.set()
        assert free.wait(60.0)

    holding = memory._other.submit(hold)
    assert busy.wait(60.0)
    done: list[int] = []
    try:
        side_by_side(COUNT, LARGE_NBYTES, done.extend)
        assert done == list(range(COUNT))
    finally:
        free.set()
        holding.result(60.0)
    assert done == list(range(COUNT))


@pytest.mark.parametrize("bad", [0, COUNT - 1])
def test_what_goes_wrong_in_either_thread_is_told(bad: int) -> None:
    met = Event()

    def work(places: Iterator[int]) -> None:
        for place in places:
            if place == bad:
                met.set()
                raise ValueError(place)
            assert met.wait(60.0)

    with pytest.raises(ValueError, match=str(bad)):
        side_by_side(COUNT, LARGE_NBYTES, work)
