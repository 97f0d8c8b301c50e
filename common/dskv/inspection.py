"""Whether a handle that came over a wire makes sense, before anybody computes or allocates with it."""

from __future__ import annotations

from itertools import combinations

from dskv.handle import KvHandle
from dskv.layout import ITEM_NBYTES, KvLayout
from dskv.shards import KvShard
from dswire.errors import ProtocolError

#: the largest KV of one sequence that is believed, in bytes
MAX_HANDLE_NBYTES = 1 << 40
#: the most ranks of an instance that are believed
MAX_SHARDS = 256


def inspect(handle: KvHandle) -> None:
    """Check a handle against itself. Raises :class:`ProtocolError` with the first thing that is wrong."""
    layout, what = handle.layout, f"handle {handle.key}"
    inspect_pool(layout, handle.shards, handle.segment_blocks, what=what)
    if handle.start < 0 or handle.key.part < 0:
        raise ProtocolError(f"{what}: part {handle.key.part}, from token {handle.start} on, cannot be")
    if handle.tokens < 1 or len(handle.blocks) != layout.blocks_for(handle.tokens):
        raise ProtocolError(
            f"{what}: {len(handle.blocks)} blocks of {layout.block_size} tokens are not what "
            f"{handle.tokens} tokens take"
        )
    if handle.nbytes > MAX_HANDLE_NBYTES:
        raise ProtocolError(f"{what}: {handle.nbytes} bytes cannot be")
    if min(handle.blocks) < 0 or max(handle.blocks) >= handle.segment_blocks:
        raise ProtocolError(f"{what}: names blocks outside a pool of {handle.segment_blocks}")


def inspect_pool(layout: KvLayout, shards: tuple[KvShard, ...], blocks: int, *, what: str = "pool") -> None:
    """Check where an owner says that its KV lies. Raises :class:`ProtocolError`."""
    shape = (layout.layers, layout.kv_heads, layout.head_dim, layout.block_size)
    if layout.dtype not in ITEM_NBYTES:
        raise ProtocolError(f"{what}: {layout.dtype!r} is no dtype of a KV pool")
    if min(*shape, blocks) < 1 or layout.block_nbytes > MAX_HANDLE_NBYTES:
        raise ProtocolError(f"{what}: a layout of {shape} in {blocks} blocks cannot be")
    if len(shards) > MAX_SHARDS:
        raise ProtocolError(f"{what}: {len(shards)} shards, {MAX_SHARDS} are believed")
    held = set()
    for shard in shards:
        inside = 0 <= shard.first_layer < shard.end_layer <= layout.layers
        if not inside or not 0 <= shard.first_head < shard.end_head <= layout.kv_heads:
            raise ProtocolError(f"{what}: {shard.segment} holds layers or heads that are none")
        held.add((shard.first_layer, shard.end_layer, shard.first_head, shard.end_head))
    area = sum((end - first) * (last - head) for first, end, head, last in held)
    twice = any(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a, b in combinations(held, 2))
    if twice or area != layout.layers * layout.kv_heads:
        raise ProtocolError(f"{what}: its shards are not all layers and heads, each once")
