"""Who has which staging slot of a relay.

The slots are split in two halves, one to send from and one to receive into, so that transfers in one direction
can never wait for those in the other. Invariant: a slot is free or has exactly one owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from dswire.errors import BadInput

OwnerT = TypeVar("OwnerT", bound=Hashable)


class StagingSlots(Generic[OwnerT]):
    """The slots ``first`` to ``first + count - 1`` of a staging segment."""

    def __init__(self, first: int, count: int) -> None:
        self._all = range(first, first + count)
        #: longest free first, so that a slot given back too early is reused as late as possible
        self._free: deque[int] = deque(self._all)
        self.owners: dict[int, OwnerT] = {}

    @property
    def free(self) -> int:
        """Slots without an owner."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Slots with an owner."""
        return len(self.owners)

    def take(self, owner: OwnerT) -> int | None:
        """A slot for ``owner``; None when all are taken."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self.owners[slot] = owner
        return slot

    def give(self, slot: int) -> OwnerT:
        """Free a slot; returns whose it was. Raises ``KeyError`` for a slot that is free already."""
        owner = self.owners.pop(slot)
        self._free.append(slot)
        return owner

    def validate(self) -> None:
        """Every slot is free or owned, none both."""
        assert sorted([*self._free, *self.owners]) == list(self._all)


def halves(staging_nbytes: int, slot_nbytes: int) -> tuple[int, int]:
    """Slots to send from and slots to receive into. Raises :class:`BadInput` when there is not one of each."""
    slots = staging_nbytes // slot_nbytes
    if slots < 2:
        raise BadInput(
            f"{staging_nbytes} bytes of staging have no room for two slots of {slot_nbytes} bytes",
            remedy="raise relay.staging in the topology, or lower relay.slot",
        )
    return slots // 2, slots - slots // 2
