"""This project's engine, whole steps of it: what a service calls, sampling included."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = 16
#: in every byte of the KV pool: 0.0115 as float32 and as bfloat16, and no page that is not really there
_FILL = 0x3C


class Ours:
    """``distserve``; the subclass leaves the compiled kernels out."""

    kernels = True

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        from dsengine.config import EngineConfig
        from dsengine.runner import Engine

        tokens = max_len
        self._engine = Engine(
            EngineConfig(
                model_dir=Path(model),
                dtype="bfloat16" if dtype == "int8" else dtype,
                quantization="int8" if dtype == "int8" else None,
                device="cpu",
                block_size=BLOCK,
                num_blocks=-(-tokens // BLOCK),
                segment=None,
                threads=threads,
                max_model_len=min(8192, tokens),
                kernels=self.kernels,
            )
        )
        self._filled = False
        self._do: Callable[[], object] = lambda: None

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Make the sequences; their blocks lie apart as after a while of serving."""
        from dsengine.runner import StepItem
        from dswire.messages.client import Sampling

        engine = self._engine
        self._fill()
        each = -(-context // BLOCK)
        blocks = [list(range(i, each * batch, batch)) for i in range(batch)]
        samplers = [
            engine.sampler(Sampling(temperature=temperature, top_p=top_p, seed=i, ignore_eos=True), [], [])
            for i in range(batch)
        ]
        if phase == "prefill":
            tokens = [(7 * i + 11) % engine.model.vocab_size for i in range(context)]
            items = [StepItem(tokens, 0, blocks[0], samplers[0])]
        else:
            items = [StepItem((100 + i,), context - 1, blocks[i], samplers[i]) for i in range(batch)]
        self._do = lambda: engine.step(items)

    def _fill(self) -> None:
        if not self._filled:
            pool = self._engine.pool
            ctypes.memset(pool.base, _FILL, pool.num_blocks * pool.layout.block_nbytes)
            self._filled = True

    def step(self) -> float:
        """One step."""
        begin = time.perf_counter()
        self._do()
        return time.perf_counter() - begin

    def kernel_s(self) -> float | None:
        """Of all steps so far, inside the kernels."""
        return self._engine.kernel_s


class OursTorch(Ours):
    """Without the compiled kernels."""

    kernels = False


class OursBf16(Ours):
    """In bfloat16 whatever the dtype: what int8 weights are compared with."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        super().__init__(model, "bfloat16", threads, max_len)
