"""From measured steps to the linear form of the simulator, with the errors on points that the fit has not seen.

    prefill = base + a * tokens + b * squares + c * sequences
    decode  = base + a * context + c * sequences       one fit for small batches, one for large

``squares`` of a chunk of n tokens that begins at s is ``n * n + 2 * n * s``: twice the pairs that attend to each
other, as ``n * n`` is for a whole prompt. Least squares of relative errors, no coefficient below zero. The batch at
which the large fit begins is the one with the least error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsplan.profile import Sample
from dssim.times import LinearTimes, times_of
from dswire.errors import BadInput

Column = NDArray[np.float64]

#: every so many samples, one is held out to tell the error, each in its turn
FOLDS = 5
#: samples that a fit of large batches needs, at least
LEAST_SAMPLES = 4

PREFILL = ("base_ms", "per_token_ms", "per_square_ms", "per_sequence_ms")
DECODE = ("base_ms", "per_token_ms", "per_sequence_ms")


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors, as shares."""

    count: int
    mean: float
    p90: float
    worst: float


def fit(samples: Sequence[Sample]) -> dict[str, Any]:
    """Coefficients and held-out errors. Raises :class:`BadInput` for too few samples."""
    prefill = [one for one in samples if not one.decode and _whole(one)]
    decode = [one for one in samples if one.decode]
    if min(len(prefill), len(decode)) < LEAST_SAMPLES:
        raise BadInput("the profile has too few points to fit", remedy="let `dsctl profile` go on to its end")
    mixed = [one for one in samples if not one.decode and not _whole(one)]
    small, large, boundary = _pieces(decode)
    found: dict[str, Any] = {
        "prefill": _named(PREFILL, _prefill(prefill)),
        "decode": _named(DECODE, small),
        "decode_large": _named(DECODE, large),
        "large_batch": boundary,
        "errors": {
            "prefill": _plain(held_out(prefill, lambda train, test: _features(PREFILL, test) @ _prefill(train))),
            "decode": _plain(held_out(decode, _predict_decode)),
        },
    }
    if mixed:
        times = times_of("fit", 1, found)
        found["errors"]["mixed"] = _plain(_errors(np.array([_mixed_ms(times, one) for one in mixed]), mixed))
    return found


def _mixed_ms(times: LinearTimes, one: Sample) -> float:
    """What the simulator makes of a step of chunks and single tokens; no such step is part of a fit."""
    chunks = [(start, start + tokens) for start, tokens in one.spans if tokens > 1]
    contexts = [start + 1 for start, tokens in one.spans if tokens == 1]
    return times.mixed_s(chunks, contexts) * 1e3


def _whole(one: Sample) -> bool:
    """Whether a step has no single tokens among its chunks."""
    return all(tokens > 1 for _, tokens in one.spans)


def features(names: Sequence[str], one: Sample) -> list[float]:
    """What the coefficients of those names are multiplied with."""
    decode = names == DECODE
    values = {
        "base_ms": 1.0,
        "per_token_ms": float(sum(start + tokens if decode else tokens for start, tokens in one.spans)),
        "per_square_ms": float(sum(tokens * tokens + 2 * tokens * start for start, tokens in one.spans)),
        "per_sequence_ms": float(len(one.spans)),
    }
    return [values[name] for name in names]


def _features(names: Sequence[str], samples: Sequence[Sample]) -> Column:
    return np.array([features(names, one) for one in samples])


def _prefill(samples: Sequence[Sample]) -> Column:
    return _solve(_features(PREFILL, samples), _times(samples))


def _pieces(samples: Sequence[Sample]) -> tuple[Column, Column, int]:
    """The fits of small and large batches, and where the large one begins."""
    whole = _solve(_features(DECODE, samples), _times(samples))
    best = (_cost(samples, whole), whole, whole, 2**31)
    for boundary in sorted({len(one.spans) for one in samples}):
        parts = [[one for one in samples if (len(one.spans) >= boundary) == large] for large in (False, True)]
        if min(map(len, parts)) < LEAST_SAMPLES:
            continue
        small, large = (_solve(_features(DECODE, part), _times(part)) for part in parts)
        cost = _cost(parts[0], small) + _cost(parts[1], large)
        if cost < best[0]:
            best = (cost, small, large, boundary)
    return best[1], best[2], best[3]


def _cost(samples: Sequence[Sample], coefficients: Column) -> float:
    return float(((_features(DECODE, samples) @ coefficients / _times(samples) - 1) ** 2).sum())


def _predict_decode(train: Sequence[Sample], test: Sequence[Sample]) -> Column:
    small, large, boundary = _pieces(train)
    rows = _features(DECODE, test)
    return np.array(
        [row @ (large if len(one.spans) >= boundary else small) for row, one in zip(rows, test, strict=True)]
    )


def held_out(samples: Sequence[Sample], predict: Any) -> Errors:
    """Relative errors of ``predict(train, test)`` on samples that it was not given."""
    seen: list[Sample] = []
    found: list[Column] = []
    for fold in range(FOLDS):
        test = list(samples[fold::FOLDS])
        train = [one for place, one in enumerate(samples) if place % FOLDS != fold]
        if test:
            seen += test
            found.append(predict(train, test))
    return _errors(np.concatenate(found), seen)


def _errors(predicted: Column, samples: Sequence[Sample]) -> Errors:
    ordered = sorted(np.abs(predicted / _times(samples) - 1).tolist())
    return Errors(len(ordered), float(np.mean(ordered)), ordered[int(0.9 * (len(ordered) - 1))], ordered[-1])


def _times(samples: Sequence[Sample]) -> Column:
    """Milliseconds."""
    return np.array([one.seconds * 1e3 for one in samples])


def _solve(rows: Column, times: Column) -> Column:
    """Non-negative least squares of relative errors: what comes out negative is left out, the worst first."""
    weighted = rows / times[:, None]
    # of one size, or the solution of lengths and squares together loses its digits
    scale = np.abs(weighted).max(axis=0)
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        part = np.linalg.lstsq(weighted[:, kept] / scale[kept], np.ones(len(times)), rcond=None)[0]
        if part.min() >= 0:
            found[kept] = part / scale[kept]
            break
        kept.pop(int(part.argmin()))
    return found


def _named(names: Sequence[str], coefficients: Column) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in zip(names, coefficients, strict=True)}


def _plain(errors: Errors) -> dict[str, float]:
    return {
        "points": errors.count,
        "mean": round(errors.mean, 4),
        "p90": round(errors.p90, 4),
        "worst": round(errors.worst, 4),
    }
