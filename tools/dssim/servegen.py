"""Client mixes as ServeGen publishes them: many clients, each with a rate and a burstiness of its own by the hour.

Two tables. Rates have a row for each client and window of 600 s: ``client, t_s, rate_per_s, cv``. Lengths are
histograms: ``field`` (``input_tokens`` or ``output_tokens``), ``tokens``, ``weight``. The gaps between the requests
of one client are drawn from a gamma distribution with that rate and coefficient of variation; prompt and output are
drawn independently, since only the marginals are told.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

from dssim.tracefile import amount, count, rows_of
from dssim.workload import Arrival, Lengths, gaps, weighted
from dswire.errors import BadInput

#: length of a window
WINDOW_S = 600.0

#: window's beginning -> clients' (rate, cv)
Windows = dict[float, list[tuple[float, float]]]


def mix(rates: Path, lengths: Path, rate: float | None, random: Random) -> Iterator[Arrival]:
    """The requests, window after window; ends with the table.

    ``rate``: on average over the whole table; None leaves the rates as they are. Raises :class:`BadInput`.
    """
    windows = read_rates(rates)
    if rate is not None and not 0 < rate < float("inf"):
        raise BadInput(f"a rate of {rate:g} requests a second is not possible", remedy="give a rate above 0")
    begin, end = min(windows), max(windows) + WINDOW_S
    mean = sum(one for clients in windows.values() for one, _ in clients) * WINDOW_S / (end - begin)
    factor = 1.0 if rate is None else rate / mean
    drawn = read_lengths(lengths, random)
    return (
        Arrival(start_s - begin + at_s, *next(drawn))
        for start_s in sorted(windows)
        for at_s in _window([(one * factor, cv) for one, cv in windows[start_s]], random)
    )


def _window(clients: list[tuple[float, float]], random: Random) -> Iterator[float]:
    """Arrivals of one window, in order, from its beginning."""
    return heapq.merge(*(_client(rate, cv, random) for rate, cv in clients))


def _client(rate: float, cv: float, random: Random) -> Iterator[float]:
    drawn = gaps("gamma", rate, random, cv)
    # in a window that begins anywhere between two requests, the first comes after a part of a gap
    at_s = next(drawn) * random.random()
    while at_s < WINDOW_S:
        yield at_s
        at_s += next(drawn)


def read_rates(path: Path) -> Windows:
    """The table of rates. Raises :class:`BadInput`."""
    windows: Windows = defaultdict(list)
    with rows_of(path) as rows:
        for number, row in rows:
            rate = amount(path, number, row, "rate_per_s", 0.0)
            if rate:
                cv = max(amount(path, number, row, "cv", 0.0), 1e-3)
                windows[amount(path, number, row, "t_s", 0.0)].append((rate, cv))
    if not windows:
        raise BadInput(f"{path} tells no rate above 0", remedy="give columns client, t_s, rate_per_s and cv")
    return windows


def read_lengths(path: Path, random: Random) -> Iterator[Lengths]:
    """Lengths drawn from the histograms, without end. Raises :class:`BadInput`."""
    found: dict[str, dict[int, float]] = {"input_tokens": {}, "output_tokens": {}}
    with rows_of(path) as rows:
        for number, row in rows:
            if row.get("field") in found:
                tokens = max(1, count(path, number, row, "tokens", 0))
                found[row["field"]][tokens] = amount(path, number, row, "weight", 0.0)
    for field, table in found.items():
        if not any(table.values()):
            raise BadInput(f"{path} has no {field} with a weight", remedy="give columns field, tokens and weight")
    parts = [_draw(table, random) for table in found.values()]
    return zip(*parts, strict=True)


def _draw(table: dict[int, float], random: Random) -> Iterator[int]:
    tokens, place = list(table), weighted(list(table.values()), random)
    while True:
        yield tokens[place()]
