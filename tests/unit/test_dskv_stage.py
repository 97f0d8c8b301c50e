"""The KV of a stage: summed and copied as if its layers were a model of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dskv.checksum import joined
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.segment import Segment
from dskv.shards import shards
from dskv.stage import StageKv
from dswire.errors import KvCorrupt, TransferFailed
from support.handles import LAYOUT

TOKENS, BLOCKS = 10, 12
#: two stages have three and two of them, four have two and one each
LAYERS = 5


class Side:
    """An instance with half of its stages on each of two nodes, whose files lie in one directory a node."""

    def __init__(
        self, stack: ExitStack, nodes: list[Path], name: str, tp: int, block_size: int, pp: int = 2
    ) -> None:
        self.layout = KvLayout(LAYERS, LAYOUT.kv_heads, LAYOUT.head_dim, block_size, LAYOUT.dtype)
        self.names = [f"{name}.{rank}.kv" for rank in range(pp * tp)]
        # as the process of the instance finds them, on the second node
        self.shards = shards(self.layout, tp, pp, [str(nodes[1] / one) for one in self.names])
        self.stages: list[StageKv] = []
        self.pools: list[Segment] = []
        for rank, shard in enumerate(self.shards):
            path = nodes[rank // (tp * pp // 2)] / self.names[rank]
            self.pools.append(Segment.create(path, BLOCKS, shard.layout(self.layout).block_nbytes))
            stack.callback(self.pools[-1].close)
        for stages, node in zip(((0, pp // 2), (pp // 2, pp)), nodes, strict=True):
            files = [str(node / one) for one in self.names]
            self.stages.append(StageKv(self.layout, tp, pp, stages, files, BLOCKS))
            stack.callback(self.stages[-1].close)

    def handle(self, blocks: tuple[int, ...]) -> KvHandle:
        total = joined(one.checksum(blocks) for one in self.stages)
        key = KvKey("r/0", 1)
        return KvHandle(key, "prefill-0", "n1", self.layout, TOKENS, blocks, self.shards, BLOCKS, total)


@pytest.fixture
def nodes(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "n0", tmp_path / "n1"]
    for one in made:
        one.mkdir()
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def filled(stack: ExitStack, nodes: list[Path], tp: int, block_size: int, pp: int = 2) -> tuple[Side, KvHandle]:
    """An owner; what is behind the last token is zero, as in pools that models write."""
    owner = Side(stack, nodes, "prefill-0", tp, block_size, pp)
    blocks = tuple(range(3, 3 + owner.layout.blocks_for(TOKENS)))
    draw = random.Random(tp)
    inside = TOKENS - (len(blocks) - 1) * block_size
    for pool, shard in zip(owner.pools, owner.shards, strict=True):
        layout = shard.layout(owner.layout)
        row = layout.head_dim * 2
        for at, block in enumerate(blocks):
            here = block_size if at < len(blocks) - 1 else inside
            for start in range(0, layout.block_nbytes, block_size * row):
                pool.slot(block)[start : start + here * row] = draw.randbytes(here * row)
    return owner, owner.handle(blocks)


@pytest.mark.parametrize(("pp", "own_pp"), [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize(("tp", "own_tp", "size", "own_size"), [(1, 1, 4, 4), (1, 2, 4, 4), (2, 1, 8, 4)])
def test_each_node_copies_its_layers_and_all_have_the_checksum(
    stack: ExitStack, nodes: list[Path], tp: int, own_tp: int, size: int, own_size: int, pp: int, own_pp: int
) -> None:
    _, handle = filled(stack, nodes, tp, size, pp)
    reader = Side(stack, nodes, "decode-0", own_tp, own_size, own_pp)
    blocks = tuple(reversed(range(reader.layout.blocks_for(TOKENS))))
    found = [one.bring(handle, blocks, summed=True) for one in reader.stages]
    assert joined(found) == handle.checksum
    assert found[0] != found[1]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_byte_that_changed_on_either_node_is_seen(stack: ExitStack, nodes: list[Path], stage: int) -> None:
    owner, handle = filled(stack, nodes, 1, 4)
    owner.pools[stage].slot(handle.blocks[1])[7] ^= 1
    reader = Side(stack, nodes, "decode-0", 1, 4)
    found = [one.bring(handle, (0, 1, 2), summed=True) for one in reader.stages]
    assert joined(found) != handle.checksum


def test_an_owner_with_other_stages_is_refused(stack: ExitStack, nodes: list[Path]) -> None:
    _, handle = filled(stack, nodes, 1, 4)
    layout = KvLayout(LAYERS, LAYOUT.kv_heads, LAYOUT.head_dim, 4, LAYOUT.dtype)
    # the first of three has two layers, and so has no stage of the owner
    alone = StageKv(layout, 1, 3, (0, 1), [str(nodes[0] / f"alone.{rank}.kv") for rank in range(3)], BLOCKS)
    with pytest.raises(TransferFailed, match="has no stages of the layers"):
        alone.bring(handle, (0, 1, 2), summed=True)


def test_a_node_without_the_owners_file_says_so(stack: ExitStack, nodes: list[Path]) -> None:
    _, handle = filled(stack, nodes, 1, 4)
    reader = Side(stack, nodes, "decode-0", 1, 4)
    (nodes[0] / "prefill-0.0.kv").unlink()
    with pytest.raises(TransferFailed, match="cannot be mapped"):
        reader.stages[0].bring(handle, (0, 1, 2), summed=True)
    with pytest.raises(KvCorrupt, match="takes 3 blocks"):
        reader.stages[1].bring(handle, (0, 1), summed=True)
