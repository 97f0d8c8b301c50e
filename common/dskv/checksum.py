"""The checksum of KV: xxh3_64 over the xxh3_64 of each canonical block, in token order.

Blocks are summed one by one, so that each is summed while the caches hold it. Where an instance's stages are on
several nodes nobody sees a whole block: each stage is summed as if its layers were a model of their own, and the
checksum is that of the stages' in order.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

#: of one block's sum
SUM_NBYTES = 8


def block_sum(data: memoryview) -> bytes:
    """Of one block."""
    return xxhash.xxh3_64_digest(data)


def checksum(sums: bytes | bytearray) -> int:
    """Of all, from those of the blocks in order."""
    return xxhash.xxh3_64_intdigest(sums)


def joined(stages: Iterable[int]) -> int:
    """Of all stages, from those of each in order."""
    return checksum(b"".join(one.to_bytes(SUM_NBYTES, "little") for one in stages))
