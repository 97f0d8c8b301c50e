"""Paged attention against attention over the whole sequence at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsengine import attention
from dsengine.architecture import AttentionRule
from dsengine.attention import PagedAttention, _group_rows
from dsengine.pool import KvPool
from dsengine.span import Span
from dskv.layout import KvLayout

HEADS, KV_HEADS, DIM, SIZE = 6, 2, 8, 4
LAYOUT = KvLayout(layers=2, kv_heads=KV_HEADS, head_dim=DIM, block_size=SIZE, dtype="float32")
CPU = torch.device("cpu")
PLAIN = AttentionRule()
RULES = st.builds(
    AttentionRule,
    scale=st.none() | st.floats(0.05, 1.0),
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.floats(0.5, 5.0),
)


def expected(q: Tensor, kv: Tensor, rule: AttentionRule = PLAIN) -> Tensor:
    """Causal attention in the plainest form, ``q`` ``[n, heads, dim]``."""
    group = HEADS // KV_HEADS
    k, v = (part.repeat_interleave(group, 1).transpose(0, 1) for part in kv.split(KV_HEADS, 1))  # type: ignore[no-untyped-call]
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * (1 / math.sqrt(DIM) if rule.scale is None else rule.scale)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    unseen = torch.ones(len(q), len(q)).triu(1).bool()
    if rule.window is not None:
        unseen |= torch.ones(len(q), len(q)).tril(-rule.window).bool()
    out: Tensor = scores.masked_fill(unseen, -math.inf).softmax(-1) @ v
    return out.transpose(0, 1)


def random_step(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, HEADS, DIM, generator=generator),
        torch.randn(tokens, 2 * KV_HEADS, DIM, generator=generator),
    )


def blocks_for(lengths: list[int]) -> list[list[int]]:
    """Blocks from the end of the pool downwards, alternating between sequences."""
    rows: list[list[int]] = [[] for _ in lengths]
    block = sum(LAYOUT.blocks_for(length) for length in lengths)
    while block:
        for row, length in zip(rows, lengths, strict=True):
            if len(row) < LAYOUT.blocks_for(length):
                block -= 1
                row.append(block)
    return rows


def poisoned_pool(lengths: list[int]) -> KvPool:
    """Just large enough, full of what an earlier request with broken numbers left."""
    pool = KvPool(LAYOUT, sum(LAYOUT.blocks_for(length) for length in lengths), CPU)
    pool._blocks.fill_(math.nan)
    return pool


def whole(pool: KvPool, lengths: list[int], blocks: list[list[int]]) -> PagedAttention:
    """A step of whole prompts."""
    return PagedAttention(pool, [Span(range(length), 0, row) for length, row in zip(lengths, blocks, strict=True)])


def single(pool: KvPool, positions: list[int], blocks: list[list[int]]) -> PagedAttention:
    """A step of one token for each sequence."""
    return PagedAttention(pool, [Span([at], at, row) for at, row in zip(positions, blocks, strict=True)])


@given(st.lists(st.integers(1, 13), min_size=1, max_size=4))
def test_prefill_sees_each_sequence_alone(lengths: list[int]) -> None:
    pool = poisoned_pool(lengths)
    q, kv = random_step(sum(lengths), 1)
    got = whole(pool, lengths, blocks_for(lengths))(1, q, kv)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        torch.testing.assert_close(got[part], expected(q[part], kv[part]), rtol=1e-4, atol=1e-5)
        start += length


@given(st.lists(st.tuples(st.integers(1, 13), st.integers(1, 6)), min_size=1, max_size=4))
def test_decode_continues_what_prefill_wrote(shapes: list[tuple[int, int]]) -> None:
    prompts, steps = [prompt for prompt, _ in shapes], max(count for _, count in shapes)
    lengths = [prompt + steps for prompt in prompts]
    pool, blocks = poisoned_pool(lengths), blocks_for(lengths)
    data = [random_step(length, seed) for seed, length in enumerate(lengths)]
    layer = 1
    whole(pool, prompts, blocks)(
        layer,
        torch.cat([q[:n] for (q, _), n in zip(data, prompts, strict=True)]),
        torch.cat([kv[:n] for (_, kv), n in zip(data, prompts, strict=True)]),
    )
    for step in range(steps):
        positions = [prompt + step for prompt in prompts]
        got = single(pool, positions, blocks)(
            layer,
            torch.stack([q[at] for (q, _), at in zip(data, positions, strict=True)]),
            torch.stack([kv[at] for (_, kv), at in zip(data, positions, strict=True)]),
        )
        want = torch.stack(
            [expected(q[: at + 1], kv[: at + 1])[-1] for (q, kv), at in zip(data, positions, strict=True)]
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [SIZE - 1, SIZE, SIZE + 1])
def test_bytes_behind_the_last_token_are_zero(length: int) -> None:
    pool = poisoned_pool([length + 1])
    blocks = blocks_for([length + 1])
    q, kv = random_step(length + 1, 3)
    prefill = whole(pool, [length], blocks)
    for layer in range(LAYOUT.layers):
        prefill(layer, q[:length], kv[:length])
    decode = single(pool, [length], blocks)
    for layer in range(LAYOUT.layers):
        decode(layer, q[length:], kv[length:])
    shape = (-1, LAYOUT.layers, 2, KV_HEADS, SIZE, DIM)
    slots = torch.cat([pool._blocks.view(shape)[block] for block in blocks[0]], dim=3)
    assert bool((slots[:, :, :, : length + 1] != 0).all())
    assert bool((slots[:, :, :, length + 1 :] == 0).all())


def test_sequences_of_very_different_lengths() -> None:
    lengths = [80, 3, 41, 1, 78, 36]
    pool, blocks = poisoned_pool(lengths), blocks_for(lengths)
    data = [random_step(length, seed) for seed, length in enumerate(lengths)]
    for (q, kv), length, row in zip(data, lengths, blocks, strict=True):
        if length > 1:
            whole(pool, [length - 1], [row])(0, q[:-1], kv[:-1])
    got = single(pool, [length - 1 for length in lengths], blocks)(
        0, torch.stack([q[-1] for q, _ in data]), torch.stack([kv[-1] for _, kv in data])
    )
    want = torch.stack([expected(q, kv)[-1] for q, kv in data])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_groups_hold_every_row_once_and_pad_to_twice_at_most(widths: list[int]) -> None:
    groups = _group_rows(widths)
    assert sorted(row for group in groups for row in group) == list(range(len(widths)))
    for group in groups:
        longest = max(widths[row] for row in group)
        assert longest <= 8 or longest <= 2 * min(widths[row] for row in group)
    assert len(groups) <= 8
    if len(groups) == 1:
        assert groups[0] == list(range(len(widths)))


@given(st.lists(st.integers(2, 30), min_size=1, max_size=3), RULES, st.sampled_from([1, 3, 256]))
def test_every_rule(lengths: list[int], rule: AttentionRule, queries: int) -> None:
    """Prefill up to the last token, and the last token decoded, for all pieces of queries that attend together."""
    pool, blocks = poisoned_pool(lengths), blocks_for(lengths)
    data = [random_step(length, seed) for seed, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_QUERIES", queries)
        got = whole(pool, [length - 1 for length in lengths], blocks)(
            1, torch.cat([q[:-1] for q, _ in data]), torch.cat([kv[:-1] for _, kv in data]), rule
        )
    want = [expected(q, kv, rule) for q, kv in data]
    torch.testing.assert_close(got, torch.cat([out[:-1] for out in want]), rtol=1e-4, atol=1e-5)
    last = single(pool, [length - 1 for length in lengths], blocks)(
        1, torch.stack([q[-1] for q, _ in data]), torch.stack([kv[-1] for _, kv in data]), rule
    )
    torch.testing.assert_close(last, torch.stack([out[-1] for out in want]), rtol=1e-4, atol=1e-5)


def test_layers_with_and_without_a_window_share_a_step() -> None:
    lengths, rules = [30, 11], (AttentionRule(window=6), PLAIN, AttentionRule(window=9))
    pool, blocks = poisoned_pool(lengths), blocks_for(lengths)
    data = [random_step(length, seed) for seed, length in enumerate(lengths)]
    whole(pool, [29, 10], blocks)(0, torch.cat([q[:-1] for q, _ in data]), torch.cat([kv[:-1] for _, kv in data]))
    step = single(pool, [29, 10], blocks)
    for rule in rules:
        got = step(0, torch.stack([q[-1] for q, _ in data]), torch.stack([kv[-1] for _, kv in data]), rule)
        want = torch.stack([expected(q, kv, rule)[-1] for q, kv in data])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_blocks_that_a_window_does_not_reach_are_not_read() -> None:
    pool, (blocks,) = poisoned_pool([30]), blocks_for([30])
    q, kv = random_step(30, 5)
    whole(pool, [29], [blocks])(0, q[:-1], kv[:-1])
    pool._blocks[blocks[: (30 - 6) // SIZE]] = math.nan
    rule = AttentionRule(window=6)
    got = single(pool, [29], [blocks])(0, q[-1:], kv[-1:], rule)
    torch.testing.assert_close(got, expected(q, kv, rule)[-1:], rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    RULES,
    st.sampled_from([1, 3, 256]),
)
def test_any_mix_of_whole_prompts_chunks_and_single_tokens(
    pieces: list[list[int]], rule: AttentionRule, queries: int
) -> None:
    lengths = [sum(sizes) for sizes in pieces]
    pool, blocks = poisoned_pool(lengths), blocks_for(lengths)
    data = [random_step(length, seed) for seed, length in enumerate(lengths)]
    at = [0] * len(pieces)
    while any(sizes for sizes in pieces):
        moving = [row for row, sizes in enumerate(pieces) if sizes]
        parts = {row: slice(at[row], at[row] + pieces[row].pop(0)) for row in moving}
        spans = [Span(range(part.stop - part.start), part.start, blocks[row]) for row, part in parts.items()]
        q, kv = (torch.cat([data[row][i][part] for row, part in parts.items()]) for i in (0, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_QUERIES", queries)
            got = PagedAttention(pool, spans)(1, q, kv, rule)
        seen = {row: [x[: part.stop] for x in data[row]] for row, part in parts.items()}
        want = [expected(seen[row][0], seen[row][1], rule)[part] for row, part in parts.items()]
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)
        for row, part in parts.items():
            at[row] = part.stop
