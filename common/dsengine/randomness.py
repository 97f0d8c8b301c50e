"""Random numbers that depend on nothing but a seed and a position.

SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), used as a hash of
(seed, position). Invariant: fixed for ever, because a sequence that is computed again elsewhere must come out the
same; a golden test holds it.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """The number in ``[0, 1)``, a multiple of 2⁻⁵³, for output ``position`` of the sequence with ``seed``.

    Of ``seed``, which may be any integer, the low 64 bits count.
    """
    stream = _mix(seed + _GAMMA)
    return (_mix(stream + (position + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
