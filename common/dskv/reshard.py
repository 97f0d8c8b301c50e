"""Which KV goes from which rank to which, when owner and reader share out layers and heads differently.

Pure. A :class:`Placement` says how an instance holds the KV of a model: the layout over all layers and heads, and
each rank's part of it. :func:`plan` names the boxes (layers x heads x tokens) to copy so that each rank of the
target gets all that it holds and nothing else: every (layer, head, token) of each target rank is in exactly one
:class:`Box`. Where several ranks of the source hold the same heads, the target's ranks take turns with them.
:func:`runs` turns a box into runs of bytes, as long as the two layouts allow: one for a whole block where they
are equal. Only the block size may differ between the two layouts; ``canonical`` is a placement of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import msgspec

from dskv.layout import ITEM_NBYTES, KvLayout
from dskv.shards import KvShard
from dswire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an instance holds the KV of a model: ``shards`` are the parts of its ranks, in their order."""

    layout: KvLayout
    shards: tuple[KvShard, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Layers x heads x tokens, half-open and counted over the whole model and sequence.

    It lies in one block of one rank on either side; K and V go together.
    """

    #: ranks
    source: int
    target: int
    #: places in the two lists of blocks
    source_block: int
    target_block: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie together on both sides; offsets are within a rank's block."""

    source: int
    target: int
    nbytes: int


def canonical(layout: KvLayout) -> Placement:
    """The whole model in one rank: what is summed, and what travels by way of staging slots."""
    return Placement(layout, (KvShard("", 0, layout.layers, 0, layout.kv_heads),))


def difference(source: KvLayout, target: KvLayout) -> InvalidRequest | None:
    """Why KV of the one layout cannot become KV of the other; None where it can."""
    if msgspec.structs.replace(source, block_size=target.block_size) == target:
        return None
    return InvalidRequest(
        f"KV of {_told(source)} cannot become KV of {_told(target)}",
        remedy="serve the same model with the same dtype everywhere; only the block size may differ",
    )


def plan(source: Placement, target: Placement, first: int, end: int) -> Iterator[Box]:
    """The boxes that bring the tokens ``first`` to ``end`` (not included) from ``source`` to ``target``."""
    tokens = _cut(first, end, source.layout.block_size, target.layout.block_size)
    for reads, writes, layers, heads in _parts(source.shards, target.shards):
        for low, high in tokens:
            at = low // source.layout.block_size, low // target.layout.block_size
            yield Box(reads, writes, *at, layers, heads, (low, high))


def runs(box: Box, source: Placement, target: Placement) -> tuple[Run, ...]:
    """The bytes of a box, in the order in which they lie."""
    own, other = source.shards[box.source], target.shards[box.target]
    return _runs(
        _Grid.of(own, source.layout, box),
        _Grid.of(other, target.layout, box),
        (box.layers[1] - box.layers[0], box.heads[1] - box.heads[0], box.tokens[1] - box.tokens[0]),
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """A rank's block ``[layers, 2, heads, tokens, head_dim]``, and where in it a box begins."""

    heads: int
    block_size: int
    token_nbytes: int
    layer: int
    head: int
    token: int

    @classmethod
    def of(cls, shard: KvShard, layout: KvLayout, box: Box) -> _Grid:
        return cls(
            heads=shard.end_head - shard.first_head,
            block_size=layout.block_size,
            token_nbytes=layout.head_dim * ITEM_NBYTES[layout.dtype],
            layer=box.layers[0] - shard.first_layer,
            head=box.heads[0] - shard.first_head,
            token=box.tokens[0] % layout.block_size,
        )

    def offset(self, layer: int, side: int, head: int) -> int:
        """Where the tokens of a head of the box begin; ``side`` is 0 for K and 1 for V."""
        row = ((self.layer + layer) * 2 + side) * self.heads + self.head + head
        return (row * self.block_size + self.token) * self.token_nbytes


@lru_cache(maxsize=4_096)
def _runs(source: _Grid, target: _Grid, shape: tuple[int, int, int]) -> tuple[Run, ...]:
    layers, heads, tokens = shape
    nbytes = tokens * source.token_nbytes
    found: list[Run] = []
    for at in product(range(layers), range(2), range(heads)):
        theirs, mine = source.offset(*at), target.offset(*at)
        last = found[-1] if found else None
        if last and (last.source + last.nbytes, last.target + last.nbytes) == (theirs, mine):
            found[-1] = Run(last.source, last.target, last.nbytes + nbytes)
        else:
            found.append(Run(theirs, mine, nbytes))
    return tuple(found)


@lru_cache(maxsize=256)
def _parts(
    source: tuple[KvShard, ...], target: tuple[KvShard, ...]
) -> tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...]:
    """(source rank, target rank, layers, heads) of all boxes, whatever the tokens."""
    holders: dict[tuple[int, int, int, int], list[int]] = {}
    for rank, one in enumerate(source):
        holders.setdefault((one.first_layer, one.end_layer, one.first_head, one.end_head), []).append(rank)
    parts = []
    for rank, one in enumerate(target):
        for (first_layer, end_layer, first_head, end_head), ranks in holders.items():
            layers = max(first_layer, one.first_layer), min(end_layer, one.end_layer)
            heads = max(first_head, one.first_head), min(end_head, one.end_head)
            if layers[0] < layers[1] and heads[0] < heads[1]:
                parts.append((ranks[rank % len(ranks)], rank, layers, heads))
    return tuple(parts)


def _cut(first: int, end: int, *block_sizes: int) -> list[tuple[int, int]]:
    """The tokens in pieces that cross no block on either side."""
    inner = {at for size in block_sizes for at in range(-(-first // size) * size, end, size)}
    edges = sorted({first, end} | inner)
    return list(pairwise(edges))


def _told(layout: KvLayout) -> str:
    return f"{layout.layers} layers x {layout.kv_heads} heads x {layout.head_dim} in {layout.dtype}"
