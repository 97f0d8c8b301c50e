"""A workload by its name: what people write after ``--workload``, and the requests that it means.

sharegpt, humaneval, longbench     lengths of a published histogram
fixed:IN,OUT                       the same lengths each time
FILE.csv, FILE.jsonl (or .gz)      the requests of a file, replayed where it tells their arrivals
like:FILE                          lengths like those of a file, without end
servegen:RATES,LENGTHS             a mix of clients (see :mod:`dssim.servegen`)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from random import Random

from dssim import resample, servegen, tracefile, workload
from dssim.workload import Arrival, Lengths
from dswire.errors import BadInput

#: requests of a workload without an end, when neither their number nor a time is given
REQUESTS = 500
_FIXED = re.compile(r"fixed:([0-9]{1,7}),([0-9]{1,7})")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for."""

    workload: str
    #: requests a second; None replays the arrivals of a file
    rate: float | None
    #: at most; None is all of a file, and :data:`REQUESTS` of what has no end unless ``until_s`` ends it
    requests: int | None = None
    arrival: str = "poisson"
    #: burstiness of gamma arrivals
    cv: float = 1.0
    seed: int = 0
    #: no request comes at this time or later
    until_s: float = math.inf


def make(wish: Wish) -> list[Arrival]:
    """The requests. Raises :class:`BadInput`."""
    # lengths and arrivals are drawn apart, so that another rate means the same requests
    draw, wait = Random(wish.seed), Random(~wish.seed)
    endless = wish.requests or (REQUESTS if math.isinf(wish.until_s) else tracefile.MAX_ROWS)
    if wish.workload.startswith("servegen:"):
        return _servegen(wish, draw, endless)
    if wish.workload.endswith(tracefile.SUFFIXES) and not wish.workload.startswith("like:"):
        return _file(wish, wait)
    return workload.arrivals(_gaps(wish, wait), _lengths(wish.workload, draw), endless, wish.until_s)


def _file(wish: Wish, wait: Random) -> list[Arrival]:
    read, timed = tracefile.read(Path(wish.workload))
    read = read[: wish.requests]
    if timed and wish.rate is None:
        return _within(read, wish)
    pause = _gaps(wish, wait)
    at_s, made = 0.0, []
    for one in read:
        at_s += next(pause)
        made.append(Arrival(at_s, one.prompt_tokens, one.output_tokens, one.hashes))
    return _within(made, wish)


def _within(made: list[Arrival], wish: Wish) -> list[Arrival]:
    return list(takewhile(lambda one: one.at_s < wish.until_s, made))


def _gaps(wish: Wish, wait: Random) -> Iterator[float]:
    if wish.rate is None:
        raise BadInput(f"workload {wish.workload} does not tell when requests arrive", remedy="add --rate")
    return workload.gaps(wish.arrival, wish.rate, wait, wish.cv)


def _lengths(name: str, draw: Random) -> Iterator[Lengths]:
    if found := _FIXED.fullmatch(name):
        return workload.fixed(int(found[1]), int(found[2]))
    if name.startswith("like:"):
        read, _ = tracefile.read(Path(name.removeprefix("like:")))
        return resample.fit([(one.prompt_tokens, one.output_tokens) for one in read]).draw(draw)
    if name in workload.HISTOGRAMS:
        return workload.histogram(name, draw)
    names = ", ".join(workload.HISTOGRAMS)
    remedy = f"use one of {names}, fixed:IN,OUT, a .csv or .jsonl file, like:FILE or servegen:RATES,LENGTHS"
    raise BadInput(f"--workload {name!r} is not known", remedy=remedy)


def _servegen(wish: Wish, draw: Random, most: int) -> list[Arrival]:
    parts = wish.workload.removeprefix("servegen:").split(",")
    if len(parts) != 2:
        raise BadInput(f"--workload {wish.workload!r} is not understood", remedy="write servegen:RATES,LENGTHS")
    mixed = servegen.mix(Path(parts[0]), Path(parts[1]), wish.rate, draw)
    return list(islice(takewhile(lambda one: one.at_s < wish.until_s, mixed), most))
