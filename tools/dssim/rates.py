"""One system under the same requests at several rates: where do too few of them meet their objectives?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dssim.records import Run
from dssim.statistics import Summary
from dswire.errors import BadInput

_NUMBER = r"([0-9]{1,7}(?:\.[0-9]{1,9})?)"
_FORM = re.compile(f"{_NUMBER}:{_NUMBER}:{_NUMBER}")
#: runs of one sweep
MOST = 1000


@dataclass(frozen=True, slots=True)
class AtRate:
    """What became of the workload at one rate."""

    #: requests a second
    rate: float
    run: Run
    summary: Summary


def parse(text: str) -> tuple[float, ...]:
    """Rates as ``FROM:TO:STEP``, both ends included, or as ``A,B,C``. Raises :class:`BadInput`."""
    found = _FORM.fullmatch(text.strip())
    if found:
        first, last, step = (float(part) for part in found.groups())
        count = math.floor((last - first) / step + 1e-9) + 1 if step > 0 else 0
        rates = tuple(round(first + place * step, 9) for place in range(min(max(count, 0), MOST + 1)))
    elif re.fullmatch(f"{_NUMBER}(,{_NUMBER})*", text.strip()):
        rates = tuple(float(part) for part in text.split(","))
    else:
        rates = ()
    if not rates or min(rates) <= 0 or len(rates) > MOST or list(rates) != sorted(set(rates)):
        raise BadInput(
            f"rates {text!r} are not understood",
            remedy=f"write FROM:TO:STEP or A,B,C: rising, above 0, at most {MOST} of them",
        )
    return rates


def goodput(runs: Sequence[AtRate], target: float) -> float:
    """The highest rate up to which the share of good requests stays at ``target``; straight lines in between.

    0 when it is missed from the first on.
    """
    before: AtRate | None = None
    for one in runs:
        share = one.summary.attainment.value
        if share < target:
            if before is None:
                return 0.0
            above = before.summary.attainment.value
            return before.rate + (one.rate - before.rate) * (above - target) / (above - share)
        before = one
    return before.rate if before is not None else 0.0
