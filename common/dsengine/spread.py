"""KV of an instance whose stages are on several nodes: each node sums and copies what it holds; none leaves it.

The process of the instance does that for the stages of its own node, and has the first rank of those of each other
node do it there. The checksum is of all of them together. For one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from dsengine.configs import rank_segments
from dsengine.rank_orders import RankPages, RankPull, RankSum, StageOrder
from dsengine.ranks import RankedEngine
from dskv.checksum import joined
from dskv.handle import KvHandle, KvKey
from dskv.receive import compare
from dskv.stage import StageKv
from dstopology.resolved import Instance
from dswire.errors import DsError

T = TypeVar("T")


class SpreadKv:
    """As one, to the process of the instance."""

    def __init__(self, engine: RankedEngine, instance: Instance) -> None:
        segments, runs = list(map(str, rank_segments(instance))), instance.runs
        tp, pp, blocks = instance.tp, instance.pp, engine.pool.num_blocks
        mirrored = engine.pool.mirror is not None
        self._engine = engine
        #: by place in the order of the layers
        self._near = {
            at: StageKv(engine.layout, tp, pp, (run.first, run.end), segments, blocks, mirrored=mirrored)
            for at, run in enumerate(runs)
            if run.node == instance.node
        }
        #: the first ranks of the others
        self._far = {at: run.first * tp for at, run in enumerate(runs) if at not in self._near}

    def hold(self, key: KvKey, blocks: tuple[int, ...]) -> None:
        """Have pages for ``blocks`` of mirrors until ``key`` lets them go.

        Raises :class:`TransferFailed` where there is no room on a node, and holds nothing then.
        """
        try:
            self._all(RankPages(key, blocks), lambda near: near.pages(key, blocks))
        except DsError:
            self.let_go(key)
            raise

    def let_go(self, key: KvKey) -> None:
        """What ``key`` holds, if anything, is needed no longer. Where ranks are lost, it went with them."""
        with contextlib.suppress(DsError):
            self._all(RankPages(key, ()), lambda near: near.pages(key, ()))

    def checksum(self, blocks: tuple[int, ...]) -> int:
        """Over ``blocks``. Raises :class:`DsError` where a stage cannot tell it."""
        return self._joined(RankSum(blocks), lambda near: near.checksum(blocks))

    def bring(self, handle: KvHandle, blocks: tuple[int, ...], *, summed: bool) -> None:
        """Have the KV of ``handle`` in ``blocks``, verified where it is ``summed``. Raises why it cannot be."""
        order = RankPull(handle, blocks, summed)
        found = self._joined(order, lambda near: near.bring(handle, blocks, summed=summed))
        if summed:
            compare(handle, found)

    def close(self) -> None:
        """Give the mappings back."""
        for near in self._near.values():
            near.close()

    def _joined(self, order: StageOrder, here: Callable[[StageKv], int]) -> int:
        sums = self._all(order, here)
        return joined(sums[at] for at in sorted(sums))

    def _all(self, order: StageOrder, here: Callable[[StageKv], T]) -> dict[int, T | int]:
        """What comes of the stages of each node: of ``here`` on this one, of ``order`` on the others."""

        def near() -> dict[int, T]:
            return {at: here(one) for at, one in self._near.items()}

        mine, theirs = self._engine.beside(order, list(self._far.values()), near)
        return {**mine, **{at: theirs[rank] for at, rank in self._far.items()}}
