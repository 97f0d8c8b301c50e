"""The KV of one stage of an instance whose stages are on several nodes: what its node sums and copies of it.

A stage's layers are taken for a model of their own, so blocks, checksums and copies are as everywhere else. Owner
and reader have their stages on the same nodes; pools are files of one name in each host's own directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.memory import RankPools
from dskv.pages import SPARE_NBYTES, MirrorPages
from dskv.receive import Receiver
from dskv.segment import SegmentCache
from dskv.shards import KvShard, shards, stage_layers
from dskv.transport import SharedMemory
from dswire.errors import TransferFailed


class StageKv:
    """The pools of one stage's ranks, in a process of their node. For one thread."""

    def __init__(
        self,
        layout: KvLayout,
        tp: int,
        pp: int,
        stage: int,
        segments: Sequence[str],
        blocks: int,
        *,
        mirrored: bool = False,
    ) -> None:
        """``layout``: of the whole model; ``segments``: files of all ``tp * pp`` ranks, of ``blocks`` each.

        ``mirrored``: these are not the pools but mirrors of them, whose pages come and go.

        Raises :class:`UnsupportedModel` for a model that cannot be shared out so.
        """
        self._layers = stage_layers(layout.layers, pp)[stage]
        self._layout, self._shards = of_stage(layout, shards(layout, tp, pp, segments), self._layers)
        self._directory = Path(segments[0]).parent
        self._blocks = blocks
        self._mapped = SegmentCache()
        self._mirrored = mirrored
        self._pages: MirrorPages | None = None

    def pages(self, key: KvKey, blocks: tuple[int, ...]) -> None:
        """Have pages for ``blocks`` of mirrors until ``key`` lets them go, which is said by no blocks.

        Raises :class:`TransferFailed` where there is no room, and holds nothing then.
        """
        assert self._mirrored, "the pages of a pool stay"
        if self._pages is None:
            self._pages = MirrorPages(self._pools(), SPARE_NBYTES // self._layout.block_nbytes)
        if blocks:
            self._pages.hold(key, blocks)
        else:
            self._pages.let_go(key)

    def checksum(self, blocks: Sequence[int]) -> int:
        """Over blocks of the stage. Raises :class:`TransferFailed` where a pool cannot be mapped."""
        return self._pools().checksum(blocks)

    def bring(self, handle: KvHandle, blocks: Sequence[int], *, summed: bool) -> int:
        """Copy this stage's part of ``handle`` to ``blocks``; the checksum of what lies there, 0 if not ``summed``.

        Raises :class:`TransferFailed` where the owner's pools cannot be mapped, or have other stages.
        """
        layout, every = of_stage(handle.layout, handle.shards, self._layers)
        if not every:
            first, end = self._layers
            raise TransferFailed(
                f"{handle.key}: {handle.owner} has no stage of the layers {first} to {end - 1}",
                remedy="start all processes from the same topology",
            )
        here = tuple(
            msgspec.structs.replace(one, segment=str(self._directory / Path(one.segment).name)) for one in every
        )
        part = msgspec.structs.replace(handle, layout=layout, shards=here)
        receiver = Receiver(part, self._pools(), blocks, summed=summed)
        SharedMemory(part, self._mapped).bring(receiver)
        return receiver.checksum() if summed else 0

    def close(self) -> None:
        """Give the mappings back."""
        self._mapped.close()

    def _pools(self) -> RankPools:
        # not before the ranks have made their files
        return RankPools.map(self._layout, self._shards, self._blocks, self._mapped, writable=True)


def of_stage(
    layout: KvLayout, every: Sequence[KvShard], layers: tuple[int, int]
) -> tuple[KvLayout, tuple[KvShard, ...]]:
    """The layers of a stage as a model of its own, and who of ``every`` rank has them."""
    first, end = layers
    mine = [one for one in every if (one.first_layer, one.end_layer) == layers]
    parts = tuple(msgspec.structs.replace(one, first_layer=0, end_layer=end - first) for one in mine)
    return msgspec.structs.replace(layout, layers=end - first), parts
