"""What the machine that is measured on can do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """What it does with some number of threads."""

    #: read from memory
    bytes_per_s: float
    #: of a large matrix product in the dtype that is measured
    flops_per_s: float
