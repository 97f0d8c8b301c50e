"""The KV blocks of a pool, some of which are kept for prompts that begin alike.

A full block is known by the digest of its tokens and of everything before them, so equal digests mean equal KV.
Blocks that sequences hold are counted; one that nobody holds any more stays where it is while it is known, and the
one unused for longest makes room when nothing else is free.

Invariants: every block is free, held, or idle (known, and held by nobody); a known block is full and is not
written; a digest names one block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_NBYTES = 16


def digests(tokens: Sequence[int], block_size: int, begun: Sequence[bytes] = ()) -> list[bytes]:
    """One for each full block of a sequence; ``begun``: those of its first blocks, where they are known already."""
    found = list(begun)
    parent = found[-1] if found else b""
    first = len(found) * block_size
    content, width = array("q", tokens[first:]).tobytes(), 8 * block_size
    for end in range(width, len(content) + 1, width):
        parent = blake2b(parent + content[end - width : end], digest_size=_DIGEST_NBYTES).digest()
        found.append(parent)
    return found


class PrefixIndex:
    """What another process believes a pool to keep: the digests of the blocks that it was last to fill."""

    def __init__(self, blocks: int, block_size: int) -> None:
        """No more than ``blocks``, the size of that pool."""
        self.block_size = block_size
        self._blocks = blocks
        #: used last at the end
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def found(self, chain: Sequence[bytes]) -> int:
        """Tokens of the longest known beginning of the prompt with these :func:`digests`."""
        return next((at for at, one in enumerate(chain) if one not in self._digests), len(chain)) * self.block_size

    def note(self, chain: Sequence[bytes]) -> None:
        """A prompt with these digests was given to the pool."""
        # as in the pool, the beginning stays for longest
        for digest in reversed(chain):
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        while len(self._digests) > self._blocks:
            self._digests.popitem(last=False)


class PrefixPool:
    """``blocks`` block numbers of ``block_size`` tokens each."""

    def __init__(self, blocks: int, block_size: int, *, keep: bool) -> None:
        """``keep``: whether any block is kept for another sequence."""
        self.blocks = blocks
        self.block_size = block_size
        self.keep = keep
        #: tokens of the prompts that were taken in, and how many of them were found here
        self.asked = self.found = 0
        self._free = list(range(blocks - 1, -1, -1))
        #: sequences that hold a block
        self._holders: dict[int, int] = {}
        #: known blocks that nobody holds, the one unused for longest first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """Blocks that are known, held or not."""
        return len(self._digest_of)

    def chain(self, tokens: Sequence[int]) -> list[bytes]:
        """What to look for on behalf of a prompt, short of its last token: that one is computed at any rate."""
        return digests(tokens[: len(tokens) - 1], self.block_size) if self.keep else []

    def known(self, chain: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a prompt."""
        found: list[int] = []
        for digest in chain:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def cost(self, count: int, known: Sequence[int] = ()) -> int:
        """How many blocks fewer are free after ``take(count, known)``."""
        return count - len(known) + sum(block in self._idle for block in known)

    def take(self, count: int, known: Sequence[int] = ()) -> list[int]:
        """``count`` blocks that begin with ``known``; asserts that so many are free."""
        assert self.cost(count, known) <= self.free, f"{count} blocks wanted, {self.free} free"
        for block in known:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        fresh = self._fresh(count - len(known))
        self._holders.update(dict.fromkeys(fresh, 1))
        return [*known, *fresh]

    def remember(self, tokens: Sequence[int], blocks: Sequence[int], begun: Sequence[bytes] = ()) -> None:
        """The KV of ``tokens`` lies in ``blocks``: keep the full ones when nobody holds them any more.

        ``begun``: the digests of the first blocks, where they are known already.
        """
        if not self.keep:
            return
        for digest, block in zip(digests(tokens, self.block_size, begun), blocks, strict=False):
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def give(self, blocks: Sequence[int]) -> None:
        """A sequence no longer holds ``blocks``; asserts that it did."""
        # the end of a prompt is of less use than its beginning, so it goes first
        for block in reversed(blocks):
            assert block in self._holders, f"block {block} is given back twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def distrust(self, blocks: Iterable[int]) -> None:
        """What lies in ``blocks`` may be wrong: no other sequence gets them any more."""
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
                if block in self._idle:
                    del self._idle[block]
                    self._free.append(block)

    def validate(self) -> None:
        """Every block is in exactly one place."""
        everywhere = [*self._free, *self._holders, *self._idle]
        assert sorted(everywhere) == list(range(self.blocks))
        assert all(count > 0 for count in self._holders.values())
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of
        assert self._digest_of.keys().isdisjoint(self._free)
        assert self._digest_of.keys() >= self._idle.keys()

    def holders(self) -> dict[int, int]:
        """How many sequences hold each block that is held."""
        return dict(self._holders)

    def _fresh(self, count: int) -> list[int]:
        first = max(0, len(self._free) - count)
        fresh = self._free[first:]
        del self._free[first:]
        fresh.reverse()
        while len(fresh) < count:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
            fresh.append(block)
        return fresh
