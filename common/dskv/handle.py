"""The KV handle: what a prefill instance hands out so that a decode instance can fetch a sequence's KV."""

from __future__ import annotations

import msgspec

from dskv.layout import KvLayout
from dskv.shards import KvShard


class KvKey(msgspec.Struct, frozen=True, array_like=True):
    """Name of one handle. A retry of the same sequence has a higher epoch, so that stale messages match nothing."""

    #: ``request_id/choice``
    sequence: str
    #: number of the attempt; no two attempts of one life of the router have the same
    epoch: int
    #: which part of a prompt's KV, from 1 on, where it goes in several; 0 is the last of them, or all
    part: int = 0

    @property
    def attempt(self) -> KvKey:
        """The key of the sequence: that of its last part."""
        return KvKey(self.sequence, self.epoch) if self.part else self

    def __str__(self) -> str:
        return f"{self.sequence}#{self.epoch}" + (f"+{self.part}" if self.part else "")


class KvHandle(msgspec.Struct, frozen=True):
    """Everything the decode side needs to fetch the KV and to know that it is the right KV."""

    key: KvKey
    #: instance whose pool holds the blocks
    owner: str
    #: node of the owner; its relay keeps the handle's life cycle
    node: str
    #: of the whole model; each shard has its part of the layers and heads
    layout: KvLayout
    #: tokens whose KV is in the blocks; the last block may be partly filled
    tokens: int
    #: blocks of the owner's pool, in token order; ``len(blocks) == layout.blocks_for(tokens)``
    blocks: tuple[int, ...]
    #: the pools of the owner's ranks, which together hold every layer and head
    shards: tuple[KvShard, ...]
    #: blocks in each of these pools
    segment_blocks: int
    #: of ``dskv.checksum``, over ``blocks`` in order, each as if one pool held the whole model
    checksum: int
    #: tokens before these, whose KV goes in parts of its own
    start: int = 0

    @property
    def end(self) -> int:
        """Tokens of the sequence up to the last of these."""
        return self.start + self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks together."""
        return len(self.blocks) * self.layout.block_nbytes
