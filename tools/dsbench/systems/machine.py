"""What the machine itself can do: reading memory, multiplying matrices."""

from __future__ import annotations

import time
from typing import Any

#: bytes; many times any cache
_READ_NBYTES = 512 << 20
_SIDE = 1536
_ROWS = 2048


class Machine:
    """``prepare("read" or "product")``, then :meth:`step`."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        # int8 weights meet activations in bfloat16
        self._dtype = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
        self._phase = ""
        #: by phase, made once
        self._made: dict[str, Any] = {}

    def prepare(self, phase: str, batch: int, context: int, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Fill what is read or multiplied."""
        if phase not in self._made:
            self._made[phase] = self._memory() if phase == "read" else self._factors()
        self._phase = phase

    def _memory(self) -> Any:
        return self._torch.ones(_READ_NBYTES // 4)

    def _factors(self) -> Any:
        torch = self._torch
        a, b = torch.randn(_ROWS, _SIDE), torch.randn(_SIDE, _SIDE)
        packed = torch.ops.mkldnn._reorder_linear_weight(b.to(self._dtype), _ROWS)
        return a.to(self._dtype), packed

    def step(self) -> float:
        """Seconds for one byte, or for one floating-point operation."""
        data = self._made[self._phase]
        begin = time.perf_counter()
        if self._phase == "read":
            data.sum()
            nbytes: int = data.nbytes
            return (time.perf_counter() - begin) / nbytes
        a, packed = data
        self._torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
        return (time.perf_counter() - begin) / (2 * _ROWS * _SIDE * _SIDE)
