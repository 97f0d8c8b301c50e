"""Logits of every position of a sequence, by way of an engine's own steps."""

from __future__ import annotations

import torch

from dsengine.native.decoder import Span
from dsengine.runner import Engine


def logits_of(engine: Engine, tokens: list[int], prefilled: int) -> torch.Tensor:
    """``[len(tokens), vocab_size]``: the first ``prefilled`` positions at once, the others one by one."""
    count = engine.pool.layout.blocks_for(len(tokens))
    blocks = [(7 * i + 3) % engine.pool.num_blocks for i in range(count)]  # scattered
    whole = Span(tokens[:prefilled], 0, blocks)
    rows = [engine._run([whole], range(prefilled), engine._torch_prefill).clone()]
    for position in range(prefilled, len(tokens)):
        one = Span(tokens[position : position + 1], position, blocks)
        rows.append(engine._run([one], [0], engine._torch_decode).clone())
    return torch.cat(rows)
