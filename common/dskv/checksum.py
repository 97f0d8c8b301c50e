"""The checksum of KV: xxh3_64 over the xxh3_64 of each canonical block, in token order.

Blocks are summed one by one, so that each is summed while the caches hold it.
"""

from __future__ import annotations

import xxhash

#: of one block's sum
SUM_NBYTES = 8


def block_sum(data: memoryview) -> bytes:
    """Of one block."""
    return xxhash.xxh3_64_digest(data)


def checksum(sums: bytes | bytearray) -> int:
    """Of all, from those of the blocks in order."""
    return xxhash.xxh3_64_intdigest(sums)
