"""Which part of a model's KV each rank of an instance holds.

An instance of ``tp * pp`` ranks has one pool file for each of them, in stage-major order (rank = stage * tp + its
place in the stage). Block numbers mean the same tokens in all of them; a rank's file has the layers of its stage
and the KV heads of its place. Layers go to the stages as evenly as can be, the first stages taking what is over.
Where a model has fewer KV heads than ``tp``, each is held by ``tp / kv_heads`` neighbouring ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from dskv.layout import KvLayout
from dswire.errors import UnsupportedModel


class GpuMemory(msgspec.Struct, frozen=True, array_like=True):
    """A pool in a GPU's memory, as CUDA IPC has other processes of the host open it (``dsengine.ipc``)."""

    #: of the GPU: processes may number them differently
    uuid: str
    #: what torch tells of a shared storage
    handle: bytes
    nbytes: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_needed: bool


class KvShard(msgspec.Struct, frozen=True, array_like=True):
    """The pool of one rank. Layers and heads are half-open ranges of the whole model's."""

    #: file of the rank's pool, for those who can map it
    segment: str
    first_layer: int
    end_layer: int
    first_head: int
    end_head: int
    #: where there is no such file: the pool itself
    gpu: GpuMemory | None = None

    def layout(self, whole: KvLayout) -> KvLayout:
        """How a block lies in this shard, ``whole`` being the layout over all layers and heads."""
        return msgspec.structs.replace(
            whole, layers=self.end_layer - self.first_layer, kv_heads=self.end_head - self.first_head
        )


def shards(layout: KvLayout, tp: int, pp: int, segments: Sequence[str]) -> tuple[KvShard, ...]:
    """The shards of ``tp * pp`` ranks, whose files are ``segments`` in rank order.

    Raises :class:`UnsupportedModel` where layers or KV heads cannot be shared out so.
    """
    assert len(segments) == tp * pp, f"{len(segments)} segments for {tp} x {pp} ranks"
    stages = stage_layers(layout.layers, pp)
    places = head_ranges(layout.kv_heads, tp)
    return tuple(
        KvShard(segments[stage * tp + place], *layers, *heads)
        for stage, layers in enumerate(stages)
        for place, heads in enumerate(places)
    )


def stage_layers(layers: int, pp: int) -> tuple[tuple[int, int], ...]:
    """First layer and end of each of ``pp`` stages. Raises :class:`UnsupportedModel` for too many stages."""
    if not 1 <= pp <= layers:
        raise UnsupportedModel(f"{layers} layers cannot make {pp} stages", remedy=f"choose a pp of 1 to {layers}")
    each, over = divmod(layers, pp)
    ends = [each * stage + min(stage, over) for stage in range(pp + 1)]
    return tuple(pairwise(ends))


def head_ranges(kv_heads: int, tp: int) -> tuple[tuple[int, int], ...]:
    """First KV head and end of each of ``tp`` ranks. Raises :class:`UnsupportedModel` where none is even."""
    if tp >= 1 and kv_heads % tp == 0:
        each = kv_heads // tp
        return tuple((rank * each, (rank + 1) * each) for rank in range(tp))
    if tp >= 1 and tp % kv_heads == 0:
        return tuple((rank * kv_heads // tp, rank * kv_heads // tp + 1) for rank in range(tp))
    raise UnsupportedModel(
        f"{kv_heads} KV heads cannot be shared by tp {tp}",
        remedy=f"choose a tp that divides {kv_heads}, or a multiple of it",
    )


def copies(kv_heads: int, tp: int) -> int:
    """How many of ``tp`` ranks hold each KV head."""
    return max(1, tp // kv_heads)
