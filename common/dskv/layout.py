"""How one KV block lies in memory, the same on every instance of a model.

The pool of an instance is one contiguous buffer of shape
``[num_blocks, layers, 2 (K, V), kv_heads, block_size, head_dim]``: block-major, so that a block is one
contiguous run of bytes and a hand-off is a short list of memory copies.
"""

from __future__ import annotations

import msgspec

#: bytes of one element, by the dtype's name in a topology
ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvLayout(msgspec.Struct, frozen=True):
    """Shape and dtype of a block."""

    layers: int
    kv_heads: int
    head_dim: int
    #: tokens in a block
    block_size: int
    #: key of :data:`ITEM_NBYTES`
    dtype: str

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: K and V of ``block_size`` tokens in every layer."""
        return 2 * self.layers * self.kv_heads * self.block_size * self.head_dim * ITEM_NBYTES[self.dtype]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)
