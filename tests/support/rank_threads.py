"""The ranks of an instance as threads of this process, talking through queues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dsengine.parallel import Part, drawing_rank
from dsengine.runner import Engine, StepItem
from dsengine.sampler import Sampled
from dsengine.span import Span
from support.tiny_llama import engine_config

#: a rank that hears nothing for this long, in seconds, fails its test
PATIENCE_S = 60.0

#: what one rank has for another, by the ranks' numbers
Board = defaultdict[tuple[int, int], "SimpleQueue[Tensor]"]


class QueuePeers:
    """Sums are made in the order of the places, so that all have the same."""

    def __init__(self, part: Part, board: Board) -> None:
        self._part = part
        self._board = board
        self._stage = range(part.stage * part.tp, (part.stage + 1) * part.tp)

    def add(self, x: Tensor) -> Tensor:
        for rank in self._stage:
            self._put(rank, x)
        return torch.stack([self._get(rank) for rank in self._stage]).sum(0)

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        assert x.shape[1] == widths[self._part.place]
        self._put(self._stage[0], x)
        return None if self._part.place else torch.cat([self._get(rank) for rank in self._stage], 1)

    def send(self, x: Tensor) -> None:
        self._put(self._part.rank + self._part.tp, x)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = self._get(self._part.rank - self._part.tp)
        assert (x.shape, x.dtype) == (shape, dtype)
        return x

    def _put(self, rank: int, x: Tensor) -> None:
        self._board[self._part.rank, rank].put(x.clone())

    def _get(self, rank: int) -> Tensor:
        return self._board[rank, self._part.rank].get(timeout=PATIENCE_S)


class ThreadedEngine(Engine):
    """The engine of ``tp * pp`` ranks."""

    def __init__(self, model_dir: Path, tp: int, pp: int, **changes: Any) -> None:
        config = engine_config(model_dir, **changes)
        board: Board = defaultdict(SimpleQueue)
        parts = [Part(tp, pp, rank) for rank in range(tp * pp)]
        self._others = [
            (Engine(config, part, QueuePeers(part, board)), ThreadPoolExecutor(1))
            for part in parts
            if not part.draws
        ]
        self._told: list[Future[Tensor | None]] = []
        #: steps that the others know of and we have not begun
        self._launched = 0
        own = parts[drawing_rank(tp, pp)]
        super().__init__(config, own, QueuePeers(own, board))

    def forward(self, spans: Sequence[Span], picked: Sequence[int]) -> Tensor | None:
        """Also without a launch before it."""
        if not self._launched:
            self._tell(spans, picked)
        else:
            self._launched -= 1
        return super().forward(spans, picked)

    def launch(self, batch: Sequence[StepItem]) -> Callable[[], list[Sampled | None]]:
        """Tell the others at once."""
        self._launched += 1
        return super().launch(batch)

    def _tell(self, batch: Sequence[Span], picked: Sequence[int]) -> None:
        self._told += [thread.submit(engine.forward, batch, picked) for engine, thread in self._others]

    def close(self) -> None:
        """End the threads. Raises what a rank raised."""
        for told in self._told:
            assert told.result(PATIENCE_S) is None
        for engine, thread in self._others:
            thread.shutdown()
            engine.close()
        super().close()
