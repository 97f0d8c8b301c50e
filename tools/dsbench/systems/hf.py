"""Transformers: one forward pass and a token for each row, as its ``generate`` does it, less its bookkeeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Transformers:
    """Eager mode, scaled dot product attention, dynamic cache."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.eval()
        self._do: Callable[[], float] = lambda: 0.0

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Fill a cache with small numbers."""
        from transformers import DynamicCache

        torch, model, config = self._torch, self._model, self._model.config
        if phase == "prefill":
            prompt = ((torch.arange(context) * 7 + 11) % config.vocab_size)[None]

            def read() -> float:
                begin = time.perf_counter()
                with torch.inference_mode():
                    model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
                return time.perf_counter() - begin

            self._do = read
            return
        cache = DynamicCache(config=config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, context - 1, head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape).to(model.dtype) for _ in range(2)), layer)
        tokens = torch.arange(100, 100 + batch)[:, None]

        pick = self._picker(temperature, top_p)

        def decode() -> float:
            begin = time.perf_counter()
            with torch.inference_mode():
                pick(model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]).tolist()
            seconds = time.perf_counter() - begin
            cache.crop(-1)
            return seconds

        self._do = decode

    def _picker(self, temperature: float, top_p: float) -> Callable[[Any], Any]:
        """Logits ``[batch, vocab_size]`` -> tokens, as ``generate`` goes about it."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        torch = self._torch
        if temperature == 0:
            return lambda logits: logits.argmax(-1)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))

        def draw(logits: Any) -> Any:
            return torch.multinomial(warpers(None, logits.float()).softmax(-1), 1)

        return draw

    def step(self) -> float:
        """One forward pass."""
        return self._do()
