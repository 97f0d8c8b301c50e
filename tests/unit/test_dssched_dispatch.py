"""Which instance is chosen."""

from __future__ import annotations

from dssched.dispatch import Candidate, pick


def test_nobody_to_choose_from() -> None:
    assert pick([]) is None


def test_the_shortest_queue_in_tokens_wins() -> None:
    assert pick([Candidate(30, 0, "a"), Candidate(20, 9, "b"), Candidate(40, 0, "c")]) == "b"


def test_ties_go_to_the_one_unused_for_longest() -> None:
    assert pick([Candidate(5, 3, "a"), Candidate(5, 1, "b"), Candidate(5, 2, "c")]) == "b"
    assert pick([Candidate(5, 1, "b"), Candidate(5, 1, "a")]) == "a"
