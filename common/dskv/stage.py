"""The KV of the stages that an instance has on one of several nodes: what that node sums and copies of it.

The layers of these stages are taken for a model of their own, so blocks, checksums and copies are as everywhere
else. Owner and reader have the same layers on the same nodes, in as many stages as each likes; pools are files of
one name in each host's own directory.
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
    """The pools of these stages' ranks, in a process of their node. For one thread."""

    def __init__(
        self,
        layout: KvLayout,
        tp: int,
        pp: int,
        stages: tuple[int, int],
        segments: Sequence[str],
        blocks: int,
        *,
        mirrored: bool = False,
    ) -> None:
        """``layout``: of the whole model; ``stages``: half-open; ``segments``: files of all ``tp * pp`` ranks, of
        ``blocks`` each.

        ``mirrored``: these are not the pools but mirrors of them, whose pages come and go.

        Raises :class:`UnsupportedModel` for a model that cannot be shared out so.
        """
        every = stage_layers(layout.layers, pp)[slice(*stages)]
        self._layers = every[0][0], every[-1][1]
        self._layout, self._shards = of_layers(layout, shards(layout, tp, pp, segments), self._layers)
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
        """Over blocks of these stages. Raises :class:`TransferFailed` where a pool cannot be mapped."""
        return self._pools().checksum(blocks)

    def bring(self, handle: KvHandle, blocks: Sequence[int], *, summed: bool) -> int:
        """Copy what ``handle`` has of these layers to ``blocks``; the checksum of it there, 0 if not ``summed``.

        Raises :class:`TransferFailed` where the owner's pools cannot be mapped, or have other layers here.
        """
        layout, every = of_layers(handle.layout, handle.shards, self._layers)
        if not every:
            first, end = self._layers
            raise TransferFailed(
                f"{handle.key}: {handle.owner} has no stages of the layers {first} to {end - 1}",
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


def of_layers(
    layout: KvLayout, every: Sequence[KvShard], layers: tuple[int, int]
) -> tuple[KvLayout, tuple[KvShard, ...]]:
    """The layers of some stages as a model of its own, and who of ``every`` rank has them; nobody where those have
    other layers too, or not all of these."""
    first, end = layers
    mine = [one for one in every if one.first_layer < end and one.end_layer > first]
    whole = mine and (mine[0].first_layer, mine[-1].end_layer) == layers
    parts = tuple(
        msgspec.structs.replace(one, first_layer=one.first_layer - first, end_layer=one.end_layer - first)
        for one in (mine if whole else ())
    )
    return msgspec.structs.replace(layout, layers=end - first), parts
