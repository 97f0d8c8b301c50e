"""What goes in and out of the prefill machine, beside messages and steps."""

from __future__ import annotations

from dataclasses import dataclass

from dskv.handle import KvKey

# actions


@dataclass(frozen=True, slots=True)
class Seal:
    """Checksum the blocks; ends with :class:`Sealed`."""

    key: KvKey
    blocks: tuple[int, ...]


# events


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checksum is there."""

    now: float
    key: KvKey
    checksum: int
