"""Logits of every position of a sequence, by way of the model inside an engine."""

from __future__ import annotations

import torch

from dsengine.attention import DecodeAttention, PrefillAttention
from dsengine.runner import Engine


def logits_of(engine: Engine, tokens: list[int], prefilled: int) -> torch.Tensor:
    """``[len(tokens), vocab_size]``: the first ``prefilled`` positions at once, the others one by one."""
    count = engine.pool.layout.blocks_for(len(tokens))
    blocks = [[(7 * i + 3) % engine.pool.num_blocks for i in range(count)]]  # scattered
    model, pool = engine._model, engine.pool
    with torch.inference_mode():
        prefill = PrefillAttention(pool, [prefilled], blocks)
        ids = torch.tensor(tokens)
        rows = [model.run(ids[:prefilled], torch.arange(prefilled), prefill, None)]
        for position in range(prefilled, len(tokens)):
            decode = DecodeAttention(pool, [position], blocks)
            at = torch.tensor([position])
            rows.append(model.run(ids[at], at, decode, None))
    return torch.cat(rows)
