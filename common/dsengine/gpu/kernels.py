"""The paged KV cache of a GPU, written and attended to in place, in Triton.

A program of :func:`attend_rows` takes some tokens of one sequence, for all query heads that share a KV head, and
goes over a part of the keys with a running softmax (FlashAttention, arXiv 2205.14135); where one sequence's keys
are shared out between programs, :func:`merge_parts` puts the parts together (Flash-Decoding). Scores are powers of
two.

A layer of the pool is told by a view that begins there, and the distance of two blocks; within a block and a layer
lie ``[2 (K, V), kv_heads, block_size, head_dim]`` (:mod:`dskv.layout`). ``rows`` has four numbers for each program
along its first axis: the first row of queries, how many, the position of the first, and where the sequence's blocks
begin in ``tables``; none of them is written or read where there are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_rows(
    kv,
    layer,
    slots,
    kv_stride,
    BLOCK_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """``kv`` ``[tokens, HEADS (K, then V), DIM]`` to the slots ``block * BLOCK_SIZE + offset``; -1: nowhere."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    heads = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    there = (heads < tl.where(slot >= 0, HEADS, 0))[:, None] & (dims < DIM)[None, :]
    values = tl.load(kv + token.to(tl.int64) * kv_stride + heads[:, None] * DIM + dims[None, :], mask=there)
    block = (slot // BLOCK_SIZE).to(tl.int64) * BLOCK_STRIDE
    within = (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM
    tl.store(layer + block + within[:, None] + dims[None, :], values, mask=there)


@triton.jit
def attend_rows(
    q,
    layer,
    out,
    parts,
    sums,
    rows,
    tables,
    q_stride,
    out_stride,
    scale,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``q`` and ``out`` ``[tokens, KV_HEADS * GROUP, DIM]``; SOFTCAP or WINDOW 0: none. QUERIES >= TOKENS * GROUP.

    With PARTS > 1 the third axis of programs shares the keys out; instead of ``out`` are written ``parts``
    ``[programs, KV_HEADS, PARTS, QUERIES, DIM_PADDED]`` and ``sums`` ``[.., QUERIES, 2 (highest, total)]``.
    """
    program, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(rows + program * 4)
    count = tl.load(rows + program * 4 + 1)
    position = tl.load(rows + program * 4 + 2)
    table = tables + tl.load(rows + program * 4 + 3)

    queries = tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM_PADDED)
    token = queries // GROUP
    wanted = token < tl.minimum(count, TOKENS)
    row = (first_row + token).to(tl.int64)
    column = (head * GROUP + queries % GROUP) * DIM
    there = wanted[:, None] & (dims < DIM)[None, :]
    query = tl.load(q + row[:, None] * q_stride + column[:, None] + dims[None, :], mask=there, other=0.0)

    # A tile begins at a multiple of TILE whoever asks, so that the sums of a sequence are always made alike.
    end = tl.where(count > 0, position + count, 0)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(end - begin, TILE), PARTS) * TILE
    begin += part * share
    end_here = tl.minimum(begin + share, end)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM_PADDED], tl.float32)
    for first in range(begin, end_here, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < end_here
        block = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        place = block * BLOCK_STRIDE + (head * BLOCK_SIZE + at % BLOCK_SIZE) * DIM
        seen = inside[:, None] & (dims < DIM)[None, :]
        key = tl.load(layer + place[:, None] + dims[None, :], mask=seen, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP > 0:
            score = SOFTCAP * (1.0 - 2.0 / (tl.exp(2.0 * score / SOFTCAP) + 1.0))
        visible = inside[None, :] & (at[None, :] <= (position + token)[:, None])
        if WINDOW > 0:
            visible &= at[None, :] > (position + token - WINDOW)[:, None]
        score = tl.where(visible, score * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # a row that has seen nothing yet has no highest score to count from
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(highest - base)
        value = tl.load(layer + place[:, None] + KV_HEADS * BLOCK_SIZE * DIM + dims[None, :], mask=seen, other=0.0)
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = higher

    if PARTS == 1:
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + row[:, None] * out_stride + column[:, None] + dims[None, :]
        tl.store(to, mixed.to(out.dtype.element_ty), mask=there)
    else:
        slot = (program * KV_HEADS + head).to(tl.int64) * PARTS + part
        tl.store(parts + (slot * QUERIES + queries)[:, None] * DIM_PADDED + dims[None, :], mixed)
        tl.store(sums + (slot * QUERIES + queries) * 2, highest)
        tl.store(sums + (slot * QUERIES + queries) * 2 + 1, total)


@triton.jit
def merge_parts(
    out,
    parts,
    sums,
    rows,
    out_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What the programs of :func:`attend_rows` have left, to ``out``."""
    program, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(rows + program * 4)
    count = tl.load(rows + program * 4 + 1)
    queries = tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM_PADDED)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM_PADDED], tl.float32)
    for part in range(PARTS):
        slot = (program * KV_HEADS + head).to(tl.int64) * PARTS + part
        top = tl.load(sums + (slot * QUERIES + queries) * 2)
        higher = tl.maximum(highest, top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weight = tl.exp2(highest - base), tl.exp2(top - base)
        total = total * fade + tl.load(sums + (slot * QUERIES + queries) * 2 + 1) * weight
        more = tl.load(parts + (slot * QUERIES + queries)[:, None] * DIM_PADDED + dims[None, :])
        mixed = mixed * fade[:, None] + more * weight[:, None]
        highest = higher
    token = queries // GROUP
    there = (token < tl.minimum(count, TOKENS))[:, None] & (dims < DIM)[None, :]
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (first_row + token).to(tl.int64)
    column = (head * GROUP + queries % GROUP) * DIM
    to = out + row[:, None] * out_stride + column[:, None] + dims[None, :]
    tl.store(to, mixed.to(out.dtype.element_ty), mask=there)
