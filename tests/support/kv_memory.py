"""Memory of the modelled hosts: KV pools whose content can be checked.

What lies in a block is the run of tokens that its KV stands for, so a block that is stale, torn or somebody else's
is seen for what it is: by the checksum of a hand-off, and by every decode step before it reads.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

#: tokens of one block; a negative number is memory in the middle of being written
Block: TypeAlias = tuple[int, ...]
GARBAGE: Block = (-1,)


class KvMemory:
    """Every file of shared memory, by path."""

    def __init__(self) -> None:
        self._files: dict[str, dict[int, Block]] = {}

    def create(self, path: str) -> None:
        """Make a file for blocks."""
        self._files[path] = {}

    def remove(self, path: str) -> None:
        """The file is gone; a path that was never there is no error."""
        self._files.pop(path, None)

    def exists(self, path: str) -> bool:
        """Whether it can be mapped."""
        return path in self._files

    def write(self, path: str, block: int, content: Block) -> None:
        """Fill a block of a pool."""
        self._files[path][block] = content

    def pool(self, path: str) -> Mapping[int, Block]:
        """A mapping of a pool; like a real one it outlives its file."""
        return self._files[path]


def read(pool: Mapping[int, Block], blocks: Sequence[int]) -> tuple[Block, ...]:
    """Contents of blocks of a pool."""
    return tuple(pool.get(block, GARBAGE) for block in blocks)


def checksum(contents: Sequence[Block]) -> int:
    """Of blocks in order."""
    return zlib.crc32(repr(tuple(contents)).encode())


def in_blocks(tokens: Sequence[int], block_size: int) -> list[Block]:
    """What blocks hold when they hold the KV of ``tokens``."""
    return [tuple(tokens[start : start + block_size]) for start in range(0, len(tokens), block_size)]


def torn(before: tuple[Block, ...], after: tuple[Block, ...]) -> tuple[Block, ...]:
    """What a copy reads that takes a while: the first half as it was, the rest as it has become."""
    half = len(before) // 2
    return before[:half] + after[half:]
