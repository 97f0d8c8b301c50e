"""What is asked of a system: when requests arrive, and how long they are. Deterministic by the random given."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, islice, repeat
from random import Random
from typing import TypeAlias

from dswire.errors import BadInput

#: length distributions that come with the simulator
HISTOGRAMS = ("sharegpt", "humaneval", "longbench")
ARRIVALS = ("poisson", "gamma", "constant")
#: tokens of a prompt that one hash stands for, as in Mooncake's traces
HASHED_TOKENS = 512

#: (prompt tokens, output tokens), both at least 1
Lengths: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload."""

    #: from the beginning
    at_s: float
    prompt_tokens: int
    output_tokens: int
    #: one for each :data:`HASHED_TOKENS` of the prompt, the last perhaps of fewer: prompts that begin with the same
    #: hashes begin with the same tokens; empty where that is not known, and then no two prompts are alike
    hashes: tuple[int, ...] = ()


def gaps(kind: str, rate: float, random: Random, cv: float = 1.0) -> Iterator[float]:
    """Seconds between arrivals, without end.

    ``kind`` is one of :data:`ARRIVALS`; ``rate`` is requests a second; ``cv`` is the coefficient of variation
    of the gaps, for gamma only: 1 is Poisson, more is burstier. Raises :class:`BadInput`.
    """
    if not 0 < rate < float("inf"):
        raise BadInput(f"a rate of {rate:g} requests a second is not possible", remedy="give a rate above 0")
    if kind == "gamma" and not 0 < cv < float("inf"):
        raise BadInput(f"a coefficient of variation of {cv:g} is not possible", remedy="give one above 0")
    match kind:
        case "poisson":
            return (random.expovariate(rate) for _ in repeat(None))
        case "gamma":
            shape = 1.0 / (cv * cv)
            return (random.gammavariate(shape, 1.0 / (rate * shape)) for _ in repeat(None))
        case "constant":
            return repeat(1.0 / rate)
    raise BadInput(f"arrivals {kind!r} are not known", remedy=f"use one of {', '.join(ARRIVALS)}")


def fixed(prompt_tokens: int, output_tokens: int) -> Iterator[Lengths]:
    """The same lengths without end. Raises :class:`BadInput`."""
    if prompt_tokens < 1 or output_tokens < 1:
        raise BadInput(
            f"lengths {prompt_tokens},{output_tokens}: prompt and output have at least one token each",
            remedy="write fixed:IN,OUT with numbers above 0, as fixed:128,64",
        )
    return repeat((prompt_tokens, output_tokens))


def histogram(name: str, random: Random) -> Iterator[Lengths]:
    """Lengths drawn from a published histogram, without end.

    Even within a bin; prompt and output are drawn independently, since only the marginals are published. ``name``
    is one of :data:`HISTOGRAMS`. Raises :class:`BadInput`.
    """
    if name not in HISTOGRAMS:
        raise BadInput(f"there is no workload {name!r}", remedy=f"use one of {', '.join(HISTOGRAMS)}")
    document = json.loads(files("dssim").joinpath("lengths.json").read_text())
    width = document["limit_tokens"] / document["bins"]
    tables = document["workloads"][name]
    prompt, output = (_drawing(tables[part], width, random) for part in ("prompt", "output"))
    return ((prompt(), output()) for _ in repeat(None))


def _drawing(shares: Sequence[float], width: float, random: Random) -> Callable[[], int]:
    place = weighted(shares, random)
    return lambda: max(1, round((place() + random.random()) * width))


def weighted(weights: Sequence[float], random: Random) -> Callable[[], int]:
    """Draws an index as often as its weight says."""
    ends = list(accumulate(weights))
    return lambda: min(bisect(ends, random.random() * ends[-1]), len(ends) - 1)


def arrivals(
    gaps_s: Iterator[float], lengths: Iterator[Lengths], count: int, until_s: float = math.inf
) -> list[Arrival]:
    """``count`` requests, or fewer when there are no more lengths, or the next would come at ``until_s``."""
    at_s, made = 0.0, []
    for prompt, output in islice(lengths, count):
        at_s += next(gaps_s)
        if at_s >= until_s:
            break
        made.append(Arrival(at_s, prompt, output))
    return made
