"""llama.cpp through ``llama-cpp-python``: ``llama_decode`` and an argmax, as llama-bench does, or its samplers.

The model comes as a GGUF file beside the directory: ``MODEL-bf16.gguf`` and so on, in the folder of
``DSBENCH_GGUF`` or next to the model's directory.
"""

from __future__ import annotations

import ctypes
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

_SUFFIX = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0"}
#: as in ggml.h: the Python package does not name all of them
_GGML_TYPE = {"float32": 0, "float16": 1, "bfloat16": 30, "int8": 30}
#: tokens that one call reads: llama.cpp's own default
_UBATCH = 512


def _library() -> Any:
    return import_module("llama_cpp")


class LlamaCpp:
    """The GGUF file's dtype for weights, the same dtype for the cache where llama.cpp has it."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        c = self._c = _library()
        folder = Path(os.environ.get("DSBENCH_GGUF") or Path(model).parent)
        path = folder / f"{Path(model).name}-{_SUFFIX[dtype]}.gguf"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make it with llama.cpp's convert_hf_to_gguf.py")
        self._log = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        settings = c.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(str(path).encode(), settings)
        self._dtype, self._threads = dtype, threads
        self._context: Any = None
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._batch: Any = None
        self._chain: Any = None
        self._size = 0

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """A new context; for decode, one prompt is read and its cache copied to every sequence."""
        self._open(batch, context + 8)
        self._chain = self._samplers(temperature, top_p) if temperature > 0 else None
        self._phase, self._sequences, self._context_len = phase, batch, context
        if phase == "prefill":
            return
        self._read(range(context - 1), 0)
        memory = self._c.llama_get_memory(self._context)
        for sequence in range(1, batch):
            self._c.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def step(self) -> float:
        """One step; what it added to the cache is taken away again."""
        c = self._c
        memory = c.llama_get_memory(self._context)
        begin = time.perf_counter()
        if self._phase == "prefill":
            self._read(range(self._context_len), 0)
            self._likeliest(-1)
            seconds = time.perf_counter() - begin
            c.llama_memory_clear(memory, True)
            return seconds
        last = self._context_len - 1
        self._decode([(100 + s, last, s, True) for s in range(self._sequences)])
        for s in range(self._sequences):
            self._likeliest(s) if self._chain is None else c.llama_sampler_sample(self._chain, self._context, s)
        seconds = time.perf_counter() - begin
        for s in range(self._sequences):
            c.llama_memory_seq_rm(memory, s, last, -1)
        return seconds

    def _open(self, sequences: int, length: int) -> None:
        c = self._c
        if self._context is not None:
            c.llama_free(self._context)
        settings = c.llama_context_default_params()
        settings.n_ctx = -(-length // 256) * 256 * sequences
        settings.n_seq_max = sequences
        settings.kv_unified = False
        settings.n_batch = settings.n_ubatch = _UBATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.no_perf = True
        settings.type_k = settings.type_v = _GGML_TYPE[self._dtype]
        settings.flash_attn_type = 1
        self._context = c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")

    def _samplers(self, temperature: float, top_p: float) -> Any:
        c = self._c
        if self._chain is not None:
            c.llama_sampler_free(self._chain)
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if top_p < 1:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(top_p, 1))
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(temperature))
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(1))
        return chain

    def _read(self, positions: range, sequence: int) -> None:
        rows = [((7 * p + 11) % self._vocab, p, sequence, p == positions[-1]) for p in positions]
        for start in range(0, len(rows), _UBATCH):
            self._decode(rows[start : start + _UBATCH])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        c = self._c
        if self._size < len(rows):
            self._batch, self._size = c.llama_batch_init(_UBATCH, 0, 1), _UBATCH
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _likeliest(self, row: int) -> int:
        import numpy

        logits = self._c.llama_get_logits_ith(self._context, row)
        return int(numpy.ctypeslib.as_array(logits, (self._vocab,)).argmax())
