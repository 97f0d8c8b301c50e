"""Objectives as people write them after ``--goodput``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import click

from dstopology.resolved import Slo
from dswire.errors import BadInput

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_ONE = re.compile(r"(ttft|tpot):([0-9]+(?:\.[0-9]+)?)")


def objective_options(function: CommandT) -> CommandT:
    """``--goodput`` and ``--attainment``, for :func:`objectives`."""
    for option in (
        click.option(
            "--attainment", type=click.FloatRange(0, 1), help="Share that must meet both; default likewise."
        ),
        click.option(
            "--goodput",
            multiple=True,
            metavar="ttft:MS tpot:MS",
            help="Objectives; default those of the topology, the first of several.",
        ),
    ):
        function = option(function)
    return function


def objectives(texts: Iterable[str], default: Slo | None, attainment: float | None) -> Slo:
    """``ttft:MS`` and ``tpot:MS``, apart or with a blank or comma between; the topology's for what is left out.

    Raises :class:`BadInput`, also where there is no ``default`` for what is left out.
    """
    found: dict[str, float] = {}
    for part in (part for text in texts for part in re.split(r"[\s,]+", text) if part):
        one = _ONE.fullmatch(part)
        if one is None or one[1] in found or float(one[2]) <= 0:
            raise BadInput(
                f"--goodput {part!r} is not understood", remedy='write --goodput "ttft:250 tpot:60", in ms'
            )
        found[one[1]] = float(one[2]) / 1e3
    if default is None and len(found) < 2:
        raise BadInput("there are no objectives to measure by", remedy='add --goodput "ttft:250 tpot:60", in ms')
    slo = default or Slo(found["ttft"], found["tpot"], 0.9)
    return replace(
        slo,
        ttft_s=found.get("ttft", slo.ttft_s),
        tpot_s=found.get("tpot", slo.tpot_s),
        attainment=slo.attainment if attainment is None else attainment,
    )
