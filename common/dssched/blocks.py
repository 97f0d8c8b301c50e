"""Who holds which KV block of an instance's pool.

Invariant: every block is either free or taken, never both; a block is given back exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Free list over ``blocks`` block numbers. Blocks given back last are taken first (they are warm)."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks that are taken."""
        return len(self._taken)

    def can_take(self, count: int) -> bool:
        """Whether :meth:`take` would succeed."""
        return count <= len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` blocks; asserts :meth:`can_take`."""
        assert self.can_take(count), f"{count} blocks wanted, {self.free} free"
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Give blocks back; asserts that they were taken."""
        for block in blocks:
            assert block in self._taken, f"block {block} is given back twice"
            self._taken.remove(block)
            self._free.append(block)

    def validate(self) -> None:
        """Every block is in exactly one place."""
        assert len(self._free) + len(self._taken) == self.blocks
        assert self._taken.isdisjoint(self._free)
