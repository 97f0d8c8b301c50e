"""Logits of every position of a sequence, by way of an engine's own steps."""

from __future__ import annotations

from itertools import accumulate

import torch

from dsengine.runner import Engine
from dsengine.span import Span


def logits_of(engine: Engine, tokens: list[int], *chunks: int) -> torch.Tensor:
    """``[len(tokens), vocab_size]``: first ``chunks`` positions at a time, the rest one by one."""
    count = engine.pool.layout.blocks_for(len(tokens))
    blocks = [(7 * i + 3) % engine.pool.num_blocks for i in range(count)]  # scattered
    sizes = [*chunks, *[1] * (len(tokens) - sum(chunks))]
    rows = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        span = Span(tokens[end - size : end], end - size, blocks)
        logits = engine.forward([span], range(size))
        assert logits is not None
        rows.append(logits.clone())
    return torch.cat(rows)
