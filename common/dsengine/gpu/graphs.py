"""Decode steps that a GPU runs by itself: recorded once for each size of batch, launched as one.

A step of one token each is hundreds of small kernels, and to launch them takes the CPU longer than the GPU needs
for them. What a recorded step reads lies at fixed places, which are filled before it is launched; rows behind those
of the batch belong to no token (:mod:`dsengine.gpu.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dsengine.gpu.attention import KernelAttention
from dsengine.gpu.plan import Plan, Room, single_tokens
from dsengine.model import Model
from dsengine.pool import KvPool
from dsengine.span import Span


class Recorded(Protocol):
    """A step that can be run again."""

    def replay(self) -> None:
        """Begin it."""


#: for a size, runs a step twice, the first time to find what it needs; the second is what is recorded
Record = Callable[[int, Callable[[], None]], Recorded]


def sizes_up_to(most: int) -> list[int]:
    """The batches for which steps are recorded: at most half of a step's rows are nobody's, from 16 on a third."""
    sizes = [1, 2, 4, 8, 12, 16, 20, 24, *range(32, 256, 16), *range(256, most, 32)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Of one model on one GPU."""

    def __init__(self, model: Model, pool: KvPool, heads: int, vocab: int, most: int, longest: int) -> None:
        """``heads`` and ``vocab`` of the model, up to ``most`` sequences of ``longest`` tokens in a step."""
        self._model, self._pool, self._heads = model, pool, heads
        self._sizes = sizes_up_to(most)
        self._blocks = pool.layout.blocks_for(longest)
        device = pool.device
        self._numbers = torch.zeros(self._room(most).total, dtype=torch.int32, device=device)
        # one for all sizes: what each would keep of its own is memory that the next could use
        self._logits = torch.empty((most, vocab), dtype=torch.float32, device=device)
        self._recorded: dict[int, Recorded] = {}

    def record(self, record: Record) -> None:
        """Record a step of every size, the largest first: memory is made for it, and serves the others."""
        for size in reversed(self._sizes):
            room = self._room(size)
            self._fill(single_tokens([], self._pool.layout.block_size, room))
            plan = Plan.of(self._numbers[: room.total], room)
            self._recorded[size] = record(size, partial(self._step, size, plan))

    def serves(self, spans: Sequence[Span], picked: Sequence[int]) -> bool:
        """Whether a step is one of these: a token each, and the logits of all."""
        return len(picked) == len(spans) <= self._sizes[-1] and all(len(span.tokens) == 1 for span in spans)

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Logits ``[len(spans), vocab]`` float32, which stay until the next step."""
        size = next(size for size in self._sizes if size >= len(spans))
        self._fill(single_tokens(spans, self._pool.layout.block_size, self._room(size)))
        self._recorded[size].replay()
        return self._logits[: len(spans)]

    def _room(self, size: int) -> Room:
        return Room(tokens=size, singles=size, chunks=0, blocks=size * self._blocks)

    def _fill(self, numbers: Tensor) -> None:
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)

    def _step(self, size: int, plan: Plan) -> None:
        attention = KernelAttention(self._pool, plan, heads=self._heads)
        logits = self._model.run(plan.tokens.long(), plan.positions.long(), attention, None)
        assert logits is not None, "one rank is all there is"
        self._logits[:size].copy_(logits)


def recorder(device: torch.device) -> Record:
    """Records CUDA graphs on ``device``, which share their memory."""
    # torch declares no types for these
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def record(_: int, step: Callable[[], None]) -> Recorded:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        # other threads of the process may work on the GPU meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
        recorded: Recorded = graph
        return recorded

    return record
