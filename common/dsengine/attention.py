"""Attention over the paged KV cache, one object a step.

:class:`PagedAttention` is built once a step from its spans, then called once a layer: it stores the new K and V in
the pool and attends. A span of one token gathers the blocks of its sequence together with others of the kind; a
whole prompt reads the K and V that were just computed; a chunk reads its sequence from the pool. A sequence only
ever sees its own blocks, and with a sliding window only those that the window reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsengine.architecture import AttentionRule
from dsengine.pool import KvPool
from dsengine.span import Span

#: sequences up to this many blocks go into one group whatever their lengths
_SHORT_BLOCKS = 8
#: queries of one sequence that attend together where they cannot all see the same: bounds the scores held at once
_QUERIES = 256
#: every earlier token, scaled by the head size
PLAIN = AttentionRule()


class Attention(Protocol):
    """What a model asks of the step it runs in."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = PLAIN) -> Tensor:
        """``q`` ``[tokens, heads, head_dim]``, ``kv`` ``[tokens, 2 * kv_heads, head_dim]`` -> like ``q``."""
        ...


class PagedAttention:
    """Any mix of whole prompts, chunks and single tokens, one behind the other in the token dimension."""

    def __init__(self, pool: KvPool, spans: Sequence[Span]) -> None:
        """Clears every block that the step begins and does not fill."""
        self._pool = pool
        self._index = _write_index(pool, spans)
        clear_begun(pool, spans)
        placed = list(rows_of(spans))
        self._longer: list[Whole | _Chunk] = [
            _Chunk(pool, where, span) if span.start else Whole(where)
            for where, span in placed
            if len(span.tokens) > 1
        ]
        self._single = [(where.start, span) for where, span in placed if len(span.tokens) == 1]
        #: by window, since a window needs the last blocks only
        self._groups: dict[int | None, list[_Group]] = {}

    def __call__(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule = PLAIN) -> Tensor:
        self._pool.write(layer, self._index, kv)
        parts: list[Whole | _Chunk | _Group] = [*self._longer, *self._singles(rule.window)]
        if len(parts) == 1:
            return parts[0].attend(layer, q, kv, rule)
        out = torch.empty_like(q)
        for part in parts:
            out[part.rows] = part.attend(layer, q[part.rows], kv[part.rows], rule)
        return out

    def _singles(self, window: int | None) -> list[_Group]:
        if not self._single:
            return []
        if window not in self._groups:
            self._groups[window] = self._make_groups(window)
        return self._groups[window]

    def _make_groups(self, window: int | None) -> list[_Group]:
        size = self._pool.layout.block_size
        rows, spans = zip(*self._single, strict=True)
        first = [_first_block(span.end, window, size) for span in spans]
        seen = [span.blocks[start : (span.end - 1) // size + 1] for start, span in zip(first, spans, strict=True)]
        # Positions count from the first block that is looked at.
        last = [span.start - start * size for start, span in zip(first, spans, strict=True)]
        members = _group_rows([len(blocks) for blocks in seen])
        return [
            _Group(self._pool, [rows[i] for i in group], [last[i] for i in group], [seen[i] for i in group], window)
            for group in members
        ]


def clear_begun(pool: KvPool, spans: Sequence[Span]) -> None:
    """Clear every block that a step over ``spans`` begins and does not fill."""
    size = pool.layout.block_size
    tails = [span for span in spans if span.end % size and span.end - span.end % size >= span.start]
    if tails:
        pool.clear(_indices(pool, [span.blocks[span.end // size] for span in tails]))


def rows_of(spans: Sequence[Span]) -> Iterator[tuple[slice, Span]]:
    """Each span and its rows in the step, where they come one behind the other."""
    ends = accumulate(len(span.tokens) for span in spans)
    return ((slice(end - len(span.tokens), end), span) for end, span in zip(ends, spans, strict=True))


class Whole:
    """A sequence from its first token on."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows

    def attend(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule) -> Tensor:
        """Over the K and V of this step; the layer makes no difference."""
        kv_heads = kv.shape[1] // 2
        return _causal(q, kv[:, :kv_heads].transpose(0, 1), kv[:, kv_heads:].transpose(0, 1), rule)


class _Chunk:
    """Tokens of a sequence whose beginning is in the pool."""

    def __init__(self, pool: KvPool, rows: slice, span: Span) -> None:
        self.rows = rows
        self._pool = pool
        self._span = span

    def attend(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule) -> Tensor:
        """Over the pool, where ``kv`` is already."""
        size, end = self._pool.layout.block_size, self._span.end
        first = _first_block(self._span.start + 1, rule.window, size)
        table = torch.tensor([self._span.blocks[first : -(-end // size)]]).to(q.device)
        k, v = self._pool.read(layer, self._pool.read_index(table))
        seen = end - first * size
        return _causal(q, k[0, :, :seen], v[0, :, :seen], rule)


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
        """Row ``rows[i]`` is at ``positions[i]``, counted from the first of its blocks ``used[i]``."""
        width = max(len(blocks) for blocks in used)
        # Padding repeats the sequence's own first block: masked, and never somebody else's memory.
        table = [[*blocks, *[blocks[0]] * (width - len(blocks))] for blocks in used]
        self._pool = pool
        self.rows = _indices(pool, rows)
        self._index = pool.read_index(torch.tensor(table).to(self.rows.device))
        last = _indices(pool, positions)
        columns = torch.arange(width * pool.layout.block_size, device=self.rows.device)
        self._seen = columns <= last[:, None]
        if window is not None:
            self._seen &= columns > last[:, None] - window
        self._mask: Tensor | None = None

    def attend(self, layer: int, q: Tensor, kv: Tensor, rule: AttentionRule) -> Tensor:
        """``q`` ``[rows of the group, heads, head_dim]`` -> the same shape; ``kv`` is in the pool already."""
        batch, heads, head_dim = q.shape
        k, v = self._pool.read(layer, self._index)
        # The heads that share a KV head stand in the place of query positions: no copy of K and V for each.
        grouped = q.reshape(batch, k.shape[1], -1, head_dim)
        if self._mask is None:
            self._mask = _additive(self._seen, q.dtype)[:, None, None, :]
        return _attend(grouped, k, v, self._mask, rule).reshape(batch, heads, head_dim)


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """The last tokens of one sequence over all: ``[tokens, heads, head_dim]``, ``[kv_heads, keys, head_dim]``."""
    tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[0]
    # [kv_heads, heads of each, tokens, head_dim]; K and V are seen by every head of a group without being copied.
    grouped = q.reshape(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (part[:, None].expand(-1, grouped.shape[1], -1, -1) for part in (k, v))
    if tokens == keys and rule.softcap is None and (rule.window is None or tokens <= rule.window):
        out = scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=rule.scale)
    else:
        pieces = [grouped[:, :, first : first + _QUERIES] for first in range(0, tokens, _QUERIES)]
        starts = range(keys - tokens, keys, _QUERIES)
        out = torch.cat([_piece(p, k, v, start, rule) for p, start in zip(pieces, starts, strict=True)], 2)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _piece(q: Tensor, k: Tensor, v: Tensor, start: int, rule: AttentionRule) -> Tensor:
    """Queries of a sequence from position ``start`` on, over the keys that they can see."""
    end = start + q.shape[2]
    first = 0 if rule.window is None else max(0, start + 1 - rule.window)
    queries, keys = (torch.arange(*bounds, device=q.device) for bounds in ((start, end), (first, end)))
    distance = queries[:, None] - keys
    seen = distance >= 0
    if rule.window is not None:
        seen &= distance < rule.window
    return _attend(q, k[:, :, first:end], v[:, :, first:end], _additive(seen, q.dtype), rule)


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


def _write_index(pool: KvPool, spans: Sequence[Span]) -> Tensor:
    size = pool.layout.block_size
    blocks = chain.from_iterable([span.blocks[at // size] for at in range(span.start, span.end)] for span in spans)
    offsets = chain.from_iterable(range(span.start, span.end) for span in spans)
    return pool.write_index(_indices(pool, blocks), _indices(pool, offsets) % size)


def _first_block(seen_by: int, window: int | None, size: int) -> int:
    """The first block that the token before position ``seen_by`` can see."""
    return 0 if window is None else max(0, seen_by - window) // size


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


def _indices(pool: KvPool, values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64).to(pool.device)
