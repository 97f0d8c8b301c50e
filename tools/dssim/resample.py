"""Lengths like those of recent requests: a joint distribution fitted to a log, and drawn from without end.

A kernel density over (log prompt, log output): a draw is one of the requests, its lengths moved a little. That
keeps what marginals lose, namely which prompts have long answers. Scott's rule gives the width (Scott, Multivariate
Density Estimation, 6.3), for each coordinate its deviation times ``n ** (-1 / 6)``; no draw leaves the range seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import pstdev

from dssim.workload import Lengths
from dswire.errors import BadInput


@dataclass(frozen=True, slots=True)
class JointLengths:
    """The fitted distribution."""

    seen: tuple[Lengths, ...]
    #: deviations of the kernel, in natural logarithms of prompt and output
    widths: tuple[float, float]

    def draw(self, random: Random) -> Iterator[Lengths]:
        """Lengths without end."""
        ranges = [(min(side), max(side)) for side in zip(*self.seen, strict=True)]
        while True:
            prompt, output = (
                min(max(round(math.exp(random.gauss(math.log(tokens), width))), least), most)
                for tokens, width, (least, most) in zip(random.choice(self.seen), self.widths, ranges, strict=True)
            )
            yield prompt, output


def fit(seen: Sequence[Lengths]) -> JointLengths:
    """The distribution of these lengths. Raises :class:`BadInput` for none."""
    if not seen:
        raise BadInput("there are no lengths to be like")
    scale = len(seen) ** (-1 / 6)
    prompt, output = (scale * pstdev([math.log(one) for one in side]) for side in zip(*seen, strict=True))
    return JointLengths(tuple(seen), (prompt, output))
