"""vLLM on the CPU, through its offline ``LLM`` with the engine in this process, one of its steps after the other.

A decode step is one turn of its engine while all sequences have their first token: scheduler, model, drawing and
what it does with the answer. The context grows by one with each, from HALF below the one asked for to HALF above;
then the sequences begin anew. Decode prompts may be found in the prefix cache; a prefill has a first token of its
own, so that nothing of it is.
"""

from __future__ import annotations

import itertools
import os
import time
from importlib import import_module
from typing import Any

HALF = 8


class VllmCpu:
    """One core after the other bound to threads; compiled, as it comes."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}-{cores[-1]}" if len(cores) > 1 else str(cores[0])
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self._vllm: Any = import_module("vllm")
        self._llm: Any = self._vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=8192,
            enable_prefix_caching=True,
            max_num_batched_tokens=8192,
            disable_log_stats=True,
        )
        self._engine: Any = self._llm.llm_engine
        self._names = (str(number) for number in itertools.count())
        self._running: list[str] = []
        self._decode = False
        self._batch = self._context = self._left = 0
        self._draw: dict[str, float | int] = {"temperature": 0}

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Forget what ran before."""
        self._stop()
        self._decode, self._batch, self._context, self._left = phase == "decode", batch, context, 0
        self._draw = {"temperature": temperature, "top_p": top_p, "seed": 1} if temperature else {"temperature": 0}

    def step(self) -> float:
        """One prefill, or one decode step."""
        if not self._decode:
            begin = time.perf_counter()
            self._start(1, self._context, 1)
            self._until_first()
            return time.perf_counter() - begin
        if not self._left:
            self._stop()
            self._start(self._batch, max(1, self._context - HALF), 4 * HALF)
            self._until_first()
            self._left = 2 * HALF
        self._left -= 1
        begin = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - begin

    def _start(self, batch: int, length: int, tokens: int) -> None:
        params = self._vllm.SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, **self._draw)
        for sequence in range(batch):
            name = next(self._names)
            first = sequence if self._decode else int(name)
            prompt = [(first * 31 + 3) % 40000] + [(7 * i + 11) % 40000 for i in range(1, length)]
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
            self._running.append(name)

    def _until_first(self) -> None:
        """Step until every sequence has a token."""
        waiting = set(self._running)
        while waiting:
            outputs = self._engine.step()
            waiting -= {one.request_id for one in outputs if one.outputs and one.outputs[0].token_ids}
        if not self._decode:
            self._running.clear()

    def _stop(self) -> None:
        if self._running:
            self._engine.abort_request(self._running)
            self._running.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()
