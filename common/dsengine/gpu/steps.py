"""The steps of an engine on a GPU: by the kernels of this package where they can be had and are right, which is
tried before they serve."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dsengine.architecture import Architecture, AttentionRule
from dsengine.attention import PagedAttention, clear_begun, rows_of
from dsengine.config import EngineConfig
from dsengine.gpu.attention import KernelAttention, piece_tokens
from dsengine.gpu.graphs import DecodeGraphs, recorder
from dsengine.gpu.plan import Plan, any_spans
from dsengine.model import Model, is_out_of_memory
from dsengine.parallel import Part
from dsengine.pool import DTYPES, KvPool
from dsengine.span import Span
from dskv.layout import KvLayout
from dswire.errors import Failed

_log = logging.getLogger(__name__)
#: largest difference to what torch computes, as a part of the largest number
_TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 1e-2}
#: tokens of a sequence that this is tried with: several tiles of the kernels
_LONGEST = 200


class GpuSteps:
    """Steps of one model, with attention by the kernels and, where one rank is all, recorded decode steps."""

    def __init__(self, model: Model, pool: KvPool, heads: int, graphs: DecodeGraphs | None = None) -> None:
        """``heads``: of the queries, those of this rank."""
        self._model, self._pool, self._heads, self._graphs = model, pool, heads, graphs

    def run(self, spans: Sequence[Span], picked: Sequence[int]) -> Tensor | None:
        """Logits of the rows ``picked``, as of :meth:`~dsengine.runner.Engine.forward`, until the next step."""
        with _current(self._pool.device):
            clear_begun(self._pool, spans)
            if self._graphs is not None and self._graphs.serves(spans, picked):
                return self._graphs.run(spans)
            plan, attention = ready(self._pool, spans, self._heads)
            tokens, positions = plan.tokens.long(), plan.positions.long()
            rows = None if len(picked) == len(tokens) else torch.tensor(picked, dtype=torch.int64).to(tokens.device)
            return self._model.run(tokens, positions, attention, rows)


def ready(pool: KvPool, spans: Sequence[Span], heads: int) -> tuple[Plan, KernelAttention]:
    """What a step over ``spans`` needs on the GPU, and its attention."""
    piece = piece_tokens(pool, heads // pool.layout.kv_heads)
    numbers, room = any_spans(spans, pool.layout.block_size, piece)
    plan = Plan.of(numbers.to(pool.device, non_blocking=True), room)
    wholes = [rows for rows, span in rows_of(spans) if span.start == 0 and len(span.tokens) > 1]
    return plan, KernelAttention(pool, plan, wholes, heads=heads)


def open_steps(model: Model, arch: Architecture, config: EngineConfig, pool: KvPool, part: Part) -> GpuSteps | None:
    """The steps of ``model``; None, and the reason in the log, where torch has to do what the kernels cannot."""
    heads = arch.heads // part.tp
    try:
        with _current(pool.device), torch.inference_mode():
            for rule in {plan.rule for plan in arch.plan}:
                prove(pool, heads, rule)
            graphs = _graphs(model, arch, config, pool, heads) if part.whole and config.max_batch else None
    except Exception as error:  # whatever a compiler or driver lacks: torch serves without
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        _log.warning("attention on %s goes through torch, several times slower: %s", pool.device, _line(error))
        return None
    return GpuSteps(model, pool, heads, graphs)


def _graphs(
    model: Model, arch: Architecture, config: EngineConfig, pool: KvPool, heads: int
) -> DecodeGraphs | None:
    if any(plan.sparse for plan in arch.plan):
        _log.info(
            "decode steps of %s are launched kernel by kernel: which experts they need is read back", arch.name
        )
        return None
    began = time.perf_counter()
    try:
        graphs = DecodeGraphs(model, pool, heads, arch.vocab_size, config.max_batch, config.max_model_len)
        graphs.record(recorder(pool.device))
    except Exception as error:  # noqa: BLE001 - as above
        _log.warning("decode steps are launched kernel by kernel, slower: %s", _line(error))
        return None
    _log.info("decode steps up to %d sequences recorded in %.1f s", config.max_batch, time.perf_counter() - began)
    return graphs


def prove(pool: KvPool, heads: int, rule: AttentionRule) -> None:
    """Attend to random numbers as ``rule`` has it, in a pool like ``pool``.

    Raises :class:`Failed` where the kernels find something else than torch, or write elsewhere.
    """
    one = KvLayout(1, pool.layout.kv_heads, pool.layout.head_dim, pool.layout.block_size, pool.layout.dtype)
    random = torch.Generator().manual_seed(0)
    if rule.window is not None:
        rule = dataclasses.replace(rule, window=min(rule.window, _LONGEST // 2))
    spans, count = _spans(one.block_size, random)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(pool.device, DTYPES[one.dtype])

    pools = [KvPool(one, count, pool.device) for _ in range(2)]
    pools[0].blocks.copy_(numbers(*pools[0].blocks.shape))
    pools[1].blocks.copy_(pools[0].blocks)
    rows = sum(len(span.tokens) for span in spans)
    q, kv = numbers(rows, heads, one.head_dim), numbers(rows, 2 * one.kv_heads, one.head_dim)
    want = PagedAttention(pools[0], spans)(0, q, kv, rule)
    clear_begun(pools[1], spans)
    got = ready(pools[1], spans, heads)[1](0, q, kv, rule)
    off = float((got - want).abs().max() / want.abs().max())
    if not off <= _TOLERANCE[one.dtype] or not torch.equal(pools[0].blocks, pools[1].blocks):
        raise Failed(f"the kernels are off by {off:.2g} of the largest number for {rule}")


def _spans(block_size: int, random: torch.Generator) -> tuple[list[Span], int]:
    """A prompt, a chunk, and single tokens, some at borders; and how many blocks they and one more have."""
    bounds = [(0, 3), (_LONGEST - 50, _LONGEST), (0, 1), (block_size - 1, block_size), (block_size, block_size + 1)]
    bounds.append((_LONGEST - 1, _LONGEST))
    lengths = [-(-end // block_size) for _, end in bounds]
    blocks = torch.randperm(sum(lengths) + 1, generator=random).tolist()
    ends = list(accumulate(lengths))
    spans = [
        Span((1,) * (end - start), start, blocks[last - length : last])
        for (start, end), length, last in zip(bounds, lengths, ends, strict=True)
    ]
    return spans, len(blocks)


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current GPU of the thread."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
