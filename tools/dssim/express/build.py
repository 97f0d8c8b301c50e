"""The compiled simulation: built at its first use, once for all processes of this host and user."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dshost.library import build, load
from dswire.errors import Failed

_log = logging.getLogger(__name__)
#: no -ffast-math, and no fused multiplication: times are to be those that Python computes
FLAGS = ("-O2", "-ffp-contract=off", "-Wextra")


@cache
def library() -> Callable[..., int] | None:
    """The function ``simulate`` of ``simulation.cpp``; None where it cannot be built, which is logged."""
    try:
        loaded = load(build("express", Path(__file__).with_name("simulation.cpp"), FLAGS))
    except Failed as error:
        _log.warning("simulations run on the machines only: %s; %s", error, error.remedy)
        return None
    simulate: Callable[..., int] = loaded.simulate
    return simulate
