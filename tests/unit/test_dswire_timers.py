"""Named deadlines, against a table that is searched from end to end."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from dswire.timers import Timers


def test_a_name_has_one_deadline() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 5.0)
    timers.set("a", 3.0)
    timers.set("b", 4.0)
    assert (len(timers), timers.next()) == (2, 3.0)
    timers.set("a", 6.0)
    assert timers.next() == 4.0
    assert list(timers.due(10.0)) == ["b", "a"]
    assert (len(timers), timers.next()) == (0, None)


def test_cancelling_what_is_not_there_is_no_error() -> None:
    timers: Timers[str] = Timers()
    timers.cancel("a")
    timers.set("a", 1.0)
    timers.cancel("a")
    assert "a" not in timers
    assert timers.next() is None


def test_what_was_cancelled_or_moved_takes_no_room() -> None:
    timers: Timers[int] = Timers()
    timers.set(-1, 1000.0)
    for name in range(10_000):
        timers.set(name, 600.0 + name)
        timers.set(-1, 1000.0)
        timers.cancel(name)
    assert len(timers) == 1
    assert sys.getsizeof(timers._heap) < 2000
    assert list(timers.due(20_000.0)) == [-1]


def test_what_is_cancelled_while_an_earlier_one_is_dealt_with_does_not_come_up() -> None:
    timers: Timers[str] = Timers()
    for at, name in enumerate("abc"):
        timers.set(name, float(at))
    seen = []
    for name in timers.due(2.0):
        seen.append(name)
        timers.cancel("b")
    assert seen == ["a", "c"]


def test_what_is_set_while_others_are_dealt_with_comes_up_if_it_is_due() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    seen = []
    for name in timers.due(2.0):
        seen.append(name)
        if name == "a":
            timers.set("soon", 2.0)
            timers.set("late", 2.5)
    assert seen == ["a", "soon"]
    assert timers.next() == 2.5


steps = st.lists(st.tuples(st.sampled_from(["set", "cancel", "due"]), st.integers(0, 5), st.integers(0, 20)))


@given(steps)
def test_like_a_table(taken: list[tuple[str, int, int]]) -> None:
    timers: Timers[int] = Timers()
    table: dict[int, float] = {}
    for what, name, at in taken:
        if what == "set":
            timers.set(name, at)
            table[name] = at
        elif what == "cancel":
            timers.cancel(name)
            table.pop(name, None)
        else:
            due = list(timers.due(at))
            assert sorted(due) == sorted(name for name, when in table.items() if when <= at)
            assert [table[name] for name in due] == sorted(table[name] for name in due)
            table = {name: when for name, when in table.items() if when > at}
        assert len(timers) == len(table)
        assert timers.next() == min(table.values(), default=None)
        assert all((name in timers) == (name in table) for name in range(6))
