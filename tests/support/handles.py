"""Small KV handles and pools to test with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.segment import Segment

#: 256 bytes a block, 4 tokens in each
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=4, block_size=4, dtype="float16")


def make_handle(
    sequence: str = "r1/0",
    *,
    epoch: int = 0,
    owner: str = "prefill-0",
    node: str = "n0",
    blocks: Sequence[int] = (0, 1, 2),
    segment: str = "/nowhere",
    segment_blocks: int = 16,
    checksum: int = 0,
) -> KvHandle:
    """A handle whose last block is half full."""
    tokens = len(blocks) * LAYOUT.block_size - 2
    key = KvKey(sequence, epoch)
    return KvHandle(key, owner, node, LAYOUT, tokens, tuple(blocks), segment, segment_blocks, checksum)


def make_pool(path: Path, blocks: int = 16, *, seed: int = 1) -> Segment:
    """A pool in which each block has bytes of its own."""
    pool = Segment.create(path, blocks, LAYOUT.block_nbytes)
    for index in range(blocks):
        pool.slot(index)[:] = bytes((seed * 31 + index * 7 + at) % 251 for at in range(LAYOUT.block_nbytes))
    return pool


def offered(pool: Segment, sequence: str, blocks: Sequence[int], *, owner: str, node: str) -> KvHandle:
    """A handle over ``blocks`` of a real pool, with the right checksum."""
    return make_handle(
        sequence,
        owner=owner,
        node=node,
        blocks=blocks,
        segment=str(pool.path),
        segment_blocks=pool.slots,
        checksum=pool.checksum(blocks),
    )
