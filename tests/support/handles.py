"""Small KV handles and pools to test with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.memory import CanonicalBlocks, RankPools, copy
from dskv.reshard import Placement
from dskv.segment import Segment
from dskv.shards import KvShard, shards

#: 256 bytes a block, 4 tokens in each
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=4, block_size=4, dtype="float16")
#: of a rank in :func:`ranks`
RANK_BLOCKS = 10


def whole(segment: str) -> tuple[KvShard, ...]:
    """One rank's pool, which holds everything."""
    return shards(LAYOUT, 1, 1, [segment])


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
    return KvHandle(key, owner, node, LAYOUT, tokens, tuple(blocks), whole(segment), segment_blocks, checksum)


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
        checksum=RankPools.of(LAYOUT, pool).checksum(blocks),
    )


def offered_by_ranks(pools: RankPools, sequence: str, tokens: int, *, owner: str, node: str) -> KvHandle:
    """A handle over the first blocks that :func:`ranks` has made, with the right checksum."""
    layout, shares = pools.placement.layout, pools.placement.shards
    blocks = tuple(range(layout.blocks_for(tokens)))
    total = pools.checksum(blocks)
    return KvHandle(KvKey(sequence, 0), owner, node, layout, tokens, blocks, shares, RANK_BLOCKS, total)


@contextmanager
def ranks(stem: Path, tp: int, pp: int, block_size: int, *, tokens: int = 0) -> Iterator[RankPools]:
    """``tp * pp`` pools of :data:`RANK_BLOCKS` blocks; the first hold ``tokens`` tokens, and zeros behind them."""
    layout = msgspec.structs.replace(LAYOUT, block_size=block_size)
    parts = shards(layout, tp, pp, [f"{stem}-{rank}.kv" for rank in range(tp * pp)])
    with ExitStack() as stack:
        segments = [
            Segment.create(Path(one.segment), RANK_BLOCKS, one.layout(layout).block_nbytes) for one in parts
        ]
        for segment in segments:
            stack.callback(segment.close)
        made = RankPools(Placement(layout, parts), segments)
        one_token = msgspec.structs.replace(layout, block_size=1)
        for token in range(tokens):
            data = bytearray((token * 37 + at * 7) % 251 for at in range(one_token.block_nbytes))
            source = CanonicalBlocks(one_token, memoryview(data))
            copy(source, [0] * tokens, made, range(RANK_BLOCKS), token, token + 1)
        yield made
