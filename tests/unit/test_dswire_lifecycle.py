"""Transition tables, and the stories that illegal steps tell."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

import dsdecode.sequence
import dskv.lifecycle
import dsprefill.state
import dsrouter.request
from dswire.lifecycle import STORY_STEPS, IllegalTransition, Lifecycle

TABLES: list[tuple[str, Mapping[Any, frozenset[Any]]]] = [
    ("choice", dsrouter.request.TRANSITIONS),
    ("prefill", dsprefill.state.TRANSITIONS),
    ("decode", dsdecode.sequence.TRANSITIONS),
    ("handle", dskv.lifecycle.TRANSITIONS),
]
every_table = pytest.mark.parametrize("table", [table for _, table in TABLES], ids=[name for name, _ in TABLES])


class Phase(Enum):
    """A door."""

    OPEN = 0
    SHUT = 1
    LOCKED = 2


TABLE = {
    Phase.OPEN: frozenset({Phase.SHUT}),
    Phase.SHUT: frozenset({Phase.OPEN, Phase.LOCKED}),
    Phase.LOCKED: frozenset({Phase.SHUT}),
}


def test_a_step_tells_how_long_the_phase_lasted() -> None:
    life = Lifecycle("door", TABLE, Phase.OPEN, 10.0)
    assert life.move(Phase.SHUT, 12.5, "wind") == 2.5
    assert (life.phase, life.since) == (Phase.SHUT, 12.5)


def test_an_illegal_step_is_refused_with_the_story() -> None:
    life = Lifecycle("door", TABLE, Phase.OPEN, 10.0)
    life.move(Phase.SHUT, 10.25, "wind")
    life.move(Phase.OPEN, 11.0, "guest")
    with pytest.raises(IllegalTransition) as refused:
        life.move(Phase.LOCKED, 12.0, "night")
    told = str(refused.value)
    assert told == (
        "door: OPEN -> LOCKED (night); story: 0.0ms OPEN (new) -> 250.0ms SHUT (wind) -> 1000.0ms OPEN (guest)"
    )
    assert life.phase is Phase.OPEN


def test_a_long_story_keeps_its_end() -> None:
    life = Lifecycle("door", TABLE, Phase.OPEN, 0.0)
    for number in range(100):
        life.move(Phase.SHUT if number % 2 == 0 else Phase.OPEN, float(number), str(number))
    assert len(life.story) == STORY_STEPS
    assert life.story[-1] == (99.0, Phase.OPEN, "99")


@every_table
def test_tables_name_every_phase_and_lead_to_an_end(table: Mapping[Any, frozenset[Any]]) -> None:
    phases: type[Enum] = type(next(iter(table)))
    assert set(table) == set(phases)
    ends = {phase for phase, steps in table.items() if not steps}
    assert ends
    for phase in phases:
        reached, grown = {phase}, True
        while grown:
            more = {step for one in reached for step in table[one]} | reached
            grown, reached = more != reached, more
        assert reached & ends, f"{phase} leads nowhere"


@every_table
def test_every_step_that_a_table_does_not_name_is_refused(table: Mapping[Any, frozenset[Any]]) -> None:
    for start, legal in table.items():
        for to in table:
            life = Lifecycle("it", table, start, 0.0)
            if to in legal:
                life.move(to, 1.0, "legal")
                assert life.phase is to
            else:
                with pytest.raises(IllegalTransition, match=f"it: {start.name} -> {to.name} "):
                    life.move(to, 1.0, "illegal")
