"""Figures for people."""

from __future__ import annotations

import pytest

from dsobserve.terminal import digits


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.01234, "0.0123"), (12.34, "12.3"), (999.4, "999"), (999.6, "1000"), (12345.6, "12346"), (-4e4, "-40000")],
)
def test_no_figure_has_an_exponent_for_being_large(value: float, shown: str) -> None:
    assert digits(value) == shown


def test_a_figure_has_as_many_digits_as_are_asked_for() -> None:
    assert (digits(1234.5, 4), digits(0.123456, 5)) == ("1234", "0.12346")
