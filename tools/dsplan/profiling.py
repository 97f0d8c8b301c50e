"""Measures steps of the real engine over a grid: prompts, batches of prompts, chunks, decode batches by context.

In this process and, with TP, those of the other ranks. Sequences lie in blocks as after a while of serving, not one
after the other. A point is warmed up once and repeated; its figure is the median. Pipelines are not measured: their
stages are taken for even parts.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from dsplan.profile import Sample, Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsengine.runner import Engine, StepItem

Spans = tuple[tuple[int, int], ...]

LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
#: (prompts, tokens of each)
BATCHES = ((2, 32), (4, 32), (8, 32), (2, 64), (4, 64), (8, 64), (2, 128), (4, 128), (2, 256), (4, 256), (2, 512))
#: (tokens, position of the first)
CHUNKS = ((64, 256), (64, 1024), (128, 512), (256, 256), (256, 1024), (512, 512), (512, 1536))
DECODE_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
CONTEXTS = (16, 128, 512, 1024, 2048)
#: (sequences that make one token each, their context, tokens of the chunk beside them)
MIXED = ((1, 256, 64), (8, 256, 64), (8, 256, 256), (16, 256, 128))

#: tokens of a point, at most: a pool of this size is allocated
MOST_TOKENS = 32_768
BLOCK = 16
#: in every byte of the pool: 0.0115 as float32 and as bfloat16, and no page that is not really there
FILL = 0x3C


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each point is measured."""

    seconds: float = 0.5
    least: int = 3
    most: int = 25


def grid(max_model_len: int, max_batch: int, most_tokens: int = MOST_TOKENS) -> list[Spans]:
    """The steps to measure, short ones first."""
    steps: list[Spans] = [((0, length),) for length in LENGTHS]
    steps += [((0, length),) * count for count, length in BATCHES]
    steps += [((start, tokens),) for tokens, start in CHUNKS]
    steps += [((context - 1, 1),) * batch for batch in DECODE_BATCHES for context in CONTEXTS]
    steps += [((context - 1, 1),) * batch + ((0, chunk),) for batch, context, chunk in MIXED]
    ends = (max(start + tokens for start, tokens in spans) for spans in steps)
    return [
        spans
        for spans, end in zip(steps, ends, strict=True)
        if end <= max_model_len and len(spans) <= max_batch and _room(spans) <= most_tokens
    ]


def _room(spans: Spans) -> int:
    return sum(-(-(start + tokens) // BLOCK) * BLOCK for start, tokens in spans)


def make_engine(model_dir: Path, subject: Subject, tp: int, max_model_len: int, steps: list[Spans]) -> Engine:
    """An engine whose pool holds each of the steps, on ``tp`` ranks. Raises what the engine raises."""
    from dsengine.config import EngineConfig
    from dsengine.ranks import RankedEngine
    from dsengine.rendezvous import Rendezvous
    from dsengine.runner import Engine

    config = EngineConfig(
        model_dir=model_dir,
        dtype=subject.dtype,
        device="cpu",
        block_size=BLOCK,
        num_blocks=max(_room(spans) for spans in steps) // BLOCK,
        segment=None,
        threads=subject.threads,
        max_model_len=max_model_len,
        quantization=subject.quantization,
    )
    if tp == 1:
        engine = Engine(config)
    else:
        with tempfile.TemporaryDirectory() as directory:
            engine = RankedEngine("profile", [config] * tp, tp, 1, Rendezvous(Path(directory), "profile"))
    pool = engine.pool
    ctypes.memset(pool.base, FILL, pool.num_blocks * pool.layout.block_nbytes)
    return engine


def measure(engine: Engine, steps: list[Spans], effort: Effort) -> Iterator[Sample]:
    """One sample after the other."""
    for spans in steps:
        items = _items(engine, spans)
        taken = _repeat(lambda: engine.step(items), effort)  # noqa: B023 - called at once
        yield Sample(spans, median(taken), min(taken))


def _repeat(step: Callable[[], object], effort: Effort) -> list[float]:
    step()
    taken: list[float] = []
    while len(taken) < effort.least or (sum(taken) < effort.seconds and len(taken) < effort.most):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return taken


def _items(engine: Engine, spans: Spans) -> list[StepItem]:
    from dsengine.runner import StepItem
    from dswire.messages.client import Sampling

    sampling = Sampling(seed=1, ignore_eos=True)
    need = [-(-(start + tokens) // BLOCK) for start, tokens in spans]
    # dealt out in turns, as the blocks of sequences that grow together are
    dealt: list[list[int]] = [[] for _ in spans]
    following = iter(range(sum(need)))
    for turn in range(max(need)):
        for mine, blocks in zip(dealt, need, strict=True):
            if turn < blocks:
                mine.append(next(following))
    vocabulary = engine.model.vocab_size
    return [
        StepItem(
            [(7 * at + 31 * place + 11) % vocabulary for at in range(start, start + tokens)],
            start,
            blocks,
            engine.sampler(sampling, [1], []),
        )
        for place, ((start, tokens), blocks) in enumerate(zip(spans, dealt, strict=True))
    ]
