"""Attention over the paged KV cache of a GPU without gathering it: the kernels, called for a step's plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsengine.architecture import AttentionRule
from dsengine.attention import PLAIN, Whole
from dsengine.gpu.kernels import attend_rows, merge_parts, store_rows
from dsengine.gpu.plan import Plan
from dsengine.pool import KvPool

#: rows that the matrix units take at least
_FEWEST_QUERIES = 16
#: parts that the keys of a sequence are shared out in at most
_MOST_PARTS = 16
#: programs for each multiprocessor of a GPU; keys are shared out while there are fewer
_PROGRAMS = 2


class KernelAttention:
    """Any mix of whole prompts, chunks and single tokens.

    Nothing is decided by what is in the plan's tensors, so that a step can be recorded and run again with other
    numbers in them.
    """

    def __init__(self, pool: KvPool, plan: Plan, wholes: Sequence[slice] = (), *, heads: int) -> None:
        """``wholes``: rows of whole prompts; ``heads``: of the queries."""
        self._pool = pool
        self._plan = plan
        self._wholes = [Whole(rows) for rows in wholes]
        layout = pool.layout
        self._group = heads // layout.kv_heads
        self._padded = max(_power_of_two(layout.head_dim), 16)
        self._parts = _parts(len(plan.singles) * layout.kv_heads, pool.device)

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = PLAIN) -> Tensor:
        self._store(layer, kv.contiguous())
        q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for whole in self._wholes:
            out[whole.rows] = whole.attend(layer, q[whole.rows], kv[whole.rows], rule)
        if len(self._plan.singles):
            self._attend(layer, q, out, rule, self._plan.singles, 1, self._parts)
        if len(self._plan.chunks):
            tokens = piece_tokens(self._pool, self._group)
            self._attend(layer, q, out, rule, self._plan.chunks, tokens, 1)
        return out

    def _store(self, layer: int, kv: Tensor) -> None:
        layout = self._pool.layout
        heads = 2 * layout.kv_heads
        store_rows[(len(kv),)](
            *(kv, self._pool.layer(layer), self._plan.slots, kv.stride(0)),
            BLOCK_STRIDE=self._pool.blocks.shape[1],
            HEADS=heads,
            HEADS_PADDED=_power_of_two(heads),
            DIM=layout.head_dim,
            DIM_PADDED=self._padded,
            BLOCK_SIZE=layout.block_size,
        )

    def _attend(
        self, layer: int, q: Tensor, out: Tensor, rule: AttentionRule, programs: Tensor, tokens: int, parts: int
    ) -> None:
        layout = self._pool.layout
        queries = max(_power_of_two(tokens * self._group), _FEWEST_QUERIES)
        shape = (len(programs) if parts > 1 else 0, layout.kv_heads, parts, queries)
        mixed = torch.empty((*shape, self._padded), dtype=torch.float32, device=q.device)
        sums = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
        same = {
            "KV_HEADS": layout.kv_heads,
            "GROUP": self._group,
            "TOKENS": tokens,
            "QUERIES": queries,
            "DIM": layout.head_dim,
            "DIM_PADDED": self._padded,
            "PARTS": parts,
        }
        attend_rows[(len(programs), layout.kv_heads, parts)](
            *(q, self._pool.layer(layer), out, mixed, sums, programs, self._plan.tables),
            *(q.stride(0), out.stride(0), layout.head_dim**-0.5 if rule.scale is None else rule.scale),
            SOFTCAP=rule.softcap or 0.0,
            WINDOW=rule.window or 0,
            BLOCK_STRIDE=self._pool.blocks.shape[1],
            BLOCK_SIZE=layout.block_size,
            TILE=_tile(self._pool),
            **same,
        )
        if parts > 1:
            merge_parts[(len(programs), layout.kv_heads)](out, mixed, sums, programs, out.stride(0), **same)


def piece_tokens(pool: KvPool, group: int) -> int:
    """Tokens of a chunk that one program takes, for ``group`` query heads to a KV head."""
    return max((64 if _row_nbytes(pool) <= 256 else 32) // group, 1)


def _tile(pool: KvPool) -> int:
    """Keys at a time: with queries and values they have to fit the memory of a multiprocessor."""
    nbytes = _row_nbytes(pool)
    return 64 if nbytes <= 256 else 32 if nbytes <= 512 else 16


def _row_nbytes(pool: KvPool) -> int:
    return pool.blocks.element_size() * _power_of_two(pool.layout.head_dim)


def _parts(programs: int, device: torch.device) -> int:
    """So many that all multiprocessors have work, whatever the lengths of sequences turn out to be."""
    if not programs:
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = _PROGRAMS * units // programs
    return _power_of_two(min(max(wanted, 1), _MOST_PARTS))


def _power_of_two(number: int) -> int:
    """The first that is not less."""
    return 1 << (number - 1).bit_length()
