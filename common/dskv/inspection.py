"""Whether a handle that came over a wire makes sense, before anybody computes or allocates with it."""

from __future__ import annotations

from dskv.handle import KvHandle
from dskv.layout import ITEM_NBYTES
from dswire.errors import ProtocolError

#: the largest KV of one sequence that is believed, in bytes
MAX_HANDLE_NBYTES = 1 << 40


def inspect(handle: KvHandle) -> None:
    """Check a handle against itself. Raises :class:`ProtocolError` with the first thing that is wrong."""
    layout = handle.layout
    shape = (layout.layers, layout.kv_heads, layout.head_dim, layout.block_size)
    if layout.dtype not in ITEM_NBYTES:
        raise ProtocolError(f"handle {handle.key}: {layout.dtype!r} is no dtype of a KV pool")
    if min(shape) < 1 or handle.nbytes > MAX_HANDLE_NBYTES:
        raise ProtocolError(f"handle {handle.key}: a layout of {shape} in {len(handle.blocks)} blocks cannot be")
    if handle.tokens < 1 or len(handle.blocks) != layout.blocks_for(handle.tokens):
        raise ProtocolError(
            f"handle {handle.key}: {len(handle.blocks)} blocks of {layout.block_size} tokens are not what "
            f"{handle.tokens} tokens take"
        )
    if min(handle.blocks) < 0 or max(handle.blocks) >= handle.segment_blocks:
        raise ProtocolError(f"handle {handle.key}: names blocks outside a pool of {handle.segment_blocks}")
