"""Attention over the paged KV cache, one object a step.

Each object is built once a step from the batch, then called once a layer: it stores the new K and V in the pool
and attends. :class:`PrefillAttention` reads the K and V that were just computed (whole sequences, causal);
:class:`DecodeAttention` gathers the blocks of each sequence. A sequence only ever sees its own blocks, and with a
sliding window only those that the window reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsengine.architecture import AttentionRule
from dsengine.pool import KvPool

#: sequences up to this many blocks go into one group whatever their lengths
_SHORT_BLOCKS = 8
#: queries of one sequence that attend together where there is a window or a cap: bounds the scores held at once
_QUERIES = 256
#: every earlier token, scaled by the head size
_PLAIN = AttentionRule()


class Attention(Protocol):
    """What a model asks of the step it runs in."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = _PLAIN) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``kv`` ``[tokens, 2 * kv_heads, head_dim]`` -> like ``q``."""
        ...


class PrefillAttention:
    """Whole sequences, one behind the other in the token dimension."""

    def __init__(self, pool: KvPool, lengths: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        """Sequence ``i`` has ``lengths[i]`` tokens, for ``blocks[i]`` in order; clears the last of those."""
        size = pool.layout.block_size
        self._pool = pool
        self._lengths = list(lengths)
        self._index = torch.cat(
            [_sequence_index(pool, length, row) for length, row in zip(lengths, blocks, strict=True)]
        )
        tails = [row[length // size] for length, row in zip(lengths, blocks, strict=True) if length % size]
        pool.clear(_indices(pool, tails))

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = _PLAIN) -> Tensor:
        self._pool.write(layer, self._index, kv)
        parts = [
            _causal(one_q, one_kv, rule)
            for one_q, one_kv in zip(
                q.split_with_sizes(self._lengths), kv.split_with_sizes(self._lengths), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DecodeAttention:
    """One token of each sequence, all earlier ones in the pool."""

    def __init__(self, pool: KvPool, positions: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        """Sequence ``i`` writes position ``positions[i]``; ``blocks[i]`` holds its tokens, that one included."""
        size = pool.layout.block_size
        self._pool = pool
        current = [row[position // size] for position, row in zip(positions, blocks, strict=True)]
        offsets = [position % size for position in positions]
        self._index = pool.write_index(_indices(pool, current), _indices(pool, offsets))
        pool.clear(_indices(pool, [b for b, offset in zip(current, offsets, strict=True) if offset == 0]))
        self._positions = positions
        self._used = [row[: position // size + 1] for position, row in zip(positions, blocks, strict=True)]
        #: by window, since a window needs the last blocks only
        self._groups: dict[int | None, list[_Group]] = {}

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = _PLAIN) -> Tensor:
        self._pool.write(layer, self._index, kv)
        groups = self._groups.get(rule.window) or self._make_groups(rule.window)
        if len(groups) == 1:
            return groups[0].attend(layer, q, rule)
        out = torch.empty_like(q)
        for group in groups:
            out[group.rows] = group.attend(layer, q[group.rows], rule)
        return out

    def _make_groups(self, window: int | None) -> list[_Group]:
        size, positions = self._pool.layout.block_size, self._positions
        first = [0 if window is None else max(0, position + 1 - window) // size for position in positions]
        seen = [row[start:] for start, row in zip(first, self._used, strict=True)]
        # Positions count from the first block that is looked at.
        last = [position - start * size for start, position in zip(first, positions, strict=True)]
        groups = [_Group(self._pool, rows, last, seen, window) for rows in _group_rows([len(row) for row in seen])]
        self._groups[window] = groups
        return groups


class _Group:
    """Sequences of similar length, padded to the longest among them."""

    def __init__(
        self,
        pool: KvPool,
        rows: Sequence[int],
        positions: Sequence[int],
        used: Sequence[Sequence[int]],
        window: int | None,
    ) -> None:
        width = max(len(used[row]) for row in rows)
        # Padding repeats the sequence's own first block: masked, and never somebody else's memory.
        table = [[*used[row], *[used[row][0]] * (width - len(used[row]))] for row in rows]
        self._pool = pool
        self.rows = _indices(pool, rows)
        self._index = pool.read_index(torch.tensor(table).to(self.rows.device))
        last = _indices(pool, [positions[row] for row in rows])
        columns = torch.arange(width * pool.layout.block_size, device=self.rows.device)
        self._seen = columns <= last[:, None]
        if window is not None:
            self._seen &= columns > last[:, None] - window
        self._mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, rule: AttentionRule) -> Tensor:
        """``q`` ``[rows of the group, heads, head_dim]`` -> the same shape."""
        batch, heads, head_dim = q.shape
        k, v = self._pool.read(layer, self._index)
        # The heads that share a KV head stand in the place of query positions: no copy of K and V for each.
        grouped = q.reshape(batch, k.shape[1], -1, head_dim)
        if self._mask is None:
            self._mask = _additive(self._seen, q.dtype)[:, None, None, :]
        return _attend(grouped, k, v, self._mask, rule).reshape(batch, heads, head_dim)


def _causal(q: Tensor, kv: Tensor, rule: AttentionRule) -> Tensor:
    """Attention of one sequence over itself: ``[tokens, heads, head_dim]`` -> the same shape."""
    tokens, heads, head_dim = q.shape
    kv_heads = kv.shape[1] // 2
    # [kv_heads, heads of each, tokens, head_dim]; K and V are seen by every head of a group without being copied.
    grouped = q.reshape(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (part.transpose(0, 1)[:, None].expand_as(grouped) for part in (kv[:, :kv_heads], kv[:, kv_heads:]))
    if rule.softcap is None and (rule.window is None or tokens <= rule.window):
        out = scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=rule.scale)
    else:
        spans = [(start, min(start + _QUERIES, tokens)) for start in range(0, tokens, _QUERIES)]
        out = torch.cat([_span(grouped, k, v, start, end, rule) for start, end in spans], 2)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _span(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, rule: AttentionRule) -> Tensor:
    """Queries ``start`` to ``end`` of a sequence, over the keys that they can see."""
    first = 0 if rule.window is None else max(0, start + 1 - rule.window)
    queries, keys = (torch.arange(*bounds, device=q.device) for bounds in ((start, end), (first, end)))
    distance = queries[:, None] - keys
    seen = distance >= 0
    if rule.window is not None:
        seen &= distance < rule.window
    return _attend(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], _additive(seen, q.dtype), rule)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: AttentionRule) -> Tensor:
    """``q`` ``[.., .., queries, head_dim]`` over ``k`` and ``v``, ``mask`` added to the scores."""
    if rule.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores = rule.softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / rule.softcap))
    return (scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where ``seen``, minus infinity elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))


def _sequence_index(pool: KvPool, length: int, blocks: Sequence[int]) -> Tensor:
    size = pool.layout.block_size
    positions = torch.arange(length)
    table = torch.tensor(blocks[: pool.layout.blocks_for(length)])
    index = pool.write_index(table[positions // size], positions % size)
    return index.to(pool.device)


def _group_rows(widths: Sequence[int]) -> list[list[int]]:
    """Rows sorted into groups within which padding at most doubles the work. In order when one group will do."""
    longest = max(widths)
    if min(widths) * 2 >= longest or longest <= _SHORT_BLOCKS:
        return [list(range(len(widths)))]
    groups: list[list[int]] = []
    limit = 0
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        if not groups or (widths[row] * 2 < limit and limit > _SHORT_BLOCKS):
            groups.append([])
            limit = widths[row]
        groups[-1].append(row)
    return groups


def _indices(pool: KvPool, values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(pool.device)
