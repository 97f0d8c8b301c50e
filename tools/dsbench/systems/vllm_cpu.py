"""vLLM on the CPU, through its offline ``LLM``: a step is the difference between long and short answers.

vLLM shows no single step from outside, so decode is (seconds of 1 + STEPS tokens - seconds of 1 token) / STEPS, the
context in the middle of which is the one asked for. Prefix caching is off.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import Any

STEPS = 16


class VllmCpu:
    """One core after the other bound to threads; compiled, as it comes."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}-{cores[-1]}" if len(cores) > 1 else str(cores[0])
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self._vllm: Any = import_module("vllm")
        self._llm: Any = self._vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=8192,
            enable_prefix_caching=False,
            max_num_batched_tokens=8192,
            disable_log_stats=True,
        )
        self._prompts: list[Any] = []
        self._decode = False

    def prepare(self, phase: str, batch: int, context: int) -> None:
        """Make the prompts."""
        self._decode = phase == "decode"
        length = max(1, context - STEPS // 2) if self._decode else context
        self._prompts = [
            {"prompt_token_ids": [(7 * i + 11 + s) % 40000 for i in range(length)]} for s in range(batch)
        ]

    def step(self) -> float:
        """One prefill, or the mean of STEPS decode steps."""
        short = self._answer(1)
        return (self._answer(1 + STEPS) - short) / STEPS if self._decode else short

    def _answer(self, tokens: int) -> float:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        self._llm.generate(self._prompts, params, use_tqdm=False)
        return time.perf_counter() - begin
