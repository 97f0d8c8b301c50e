"""Which instance is chosen."""

from __future__ import annotations

import pytest

from dssched.dispatch import Candidate, pick, reads_locally, sending_tokens


def test_nobody_to_choose_from() -> None:
    assert pick([]) is None


def test_the_shortest_queue_in_tokens_wins() -> None:
    assert pick([Candidate(30, 0, "a"), Candidate(20, 9, "b"), Candidate(40, 0, "c")]) == "b"


def test_ties_go_to_the_one_unused_for_longest() -> None:
    assert pick([Candidate(5, 3, "a"), Candidate(5, 1, "b"), Candidate(5, 2, "c")]) == "b"
    assert pick([Candidate(5, 1, "b"), Candidate(5, 1, "a")]) == "a"


def test_kv_stays_in_its_node_unless_that_is_clearly_fuller() -> None:
    def chosen(here: int, there: int, affinity: float) -> str | None:
        instances = ((here, "n0"), (there, "n1"))
        return pick(
            Candidate(held + sending_tokens(100, "n0", node, affinity), 0, node) for held, node in instances
        )

    assert chosen(1000, 601, 4.0) == "n0"
    assert chosen(1000, 599, 4.0) == "n1"
    assert chosen(1000, 999, 0.0) == "n1"


@pytest.mark.parametrize(
    ("mode", "tokens", "local"),
    [
        ("disaggregated", 1, False),
        ("colocated", 10_000, True),
        ("conditional", 99, True),
        ("conditional", 100, False),
    ],
)
def test_who_reads_a_prompt(mode: str, tokens: int, local: bool) -> None:
    assert reads_locally(mode, tokens, 100) == local
