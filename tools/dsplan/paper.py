"""The latency model of the DistServe paper's appendix A.

    T_prefill = C1 (4 t h^2 + 2 t h m) + C2 3 h t2 / b + C3
    T_decode  = C4 (4 h^2 + 2 h m)     + C5 3 h t

``t`` tokens, ``t2`` sum of squared lengths, ``h`` hidden, ``m`` MLP width (``h`` and ``m`` over TP), ``b`` the
block of FlashAttention. The C's are for the whole model: all layers together. PP, communication and KV transfer
are not in it, nor is the batch in decode: :mod:`dsplan.linear` is what the authors' code uses instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsplan.linear import LinearInstance
from dsplan.shapes import ModelShape

#: rows of a FlashAttention block; the paper names 16 and 32
ATTENTION_BLOCK = 16


@dataclass(frozen=True, slots=True)
class PaperInstance:
    """Appendix A for one instance of PP 1. Seconds."""

    #: hidden size over TP
    hidden: float
    #: MLP width over TP
    intermediate: float
    c1: float
    c2: float
    c3: float
    c4: float
    c5: float
    block: int = ATTENTION_BLOCK
    stages: int = 1

    def prefill_stage_s(self, tokens: int, squares: int, count: int) -> float:
        """T_prefill."""
        h, m = self.hidden, self.intermediate
        return (
            self.c1 * (4 * tokens * h * h + 2 * tokens * h * m) + self.c2 * 3 * h * squares / self.block + self.c3
        )

    def decode_step_s(self, batch: int, tokens: int) -> float:
        """T_decode: the batch has no part in it."""
        h, m = self.hidden, self.intermediate
        return self.c4 * (4 * h * h + 2 * h * m) + self.c5 * 3 * h * tokens

    def mixed_stage_s(self, tokens: float, squares: float, count: int, batch: int, context: float) -> float:
        """T_prefill over all rows, and the attention of T_decode."""
        h, m = self.hidden, self.intermediate
        dense = self.c1 * (tokens + batch) * (4 * h * h + 2 * h * m) + self.c2 * 3 * h * squares / self.block
        return max(dense + self.c3, self.c4 * (4 * h * h + 2 * h * m)) + self.c5 * 3 * h * context


def from_linear(shape: ModelShape, tp: int, fit: LinearInstance, block: int = ATTENTION_BLOCK) -> PaperInstance:
    """The C's that make appendix A equal a linear fit in prefill, and in decode but for its batch term."""
    h, m = shape.hidden / tp, shape.intermediate / tp
    (a, b, c), (base, per_token, _) = fit.prefill, fit.decode_small
    weights = 4 * h * h + 2 * h * m
    return PaperInstance(
        hidden=h,
        intermediate=m,
        c1=b / 1e3 / weights,
        c2=c / 1e3 * block / (3 * h),
        c3=a / 1e3,
        c4=base / 1e3 / weights,
        c5=per_token / 1e3 / (3 * h),
        block=block,
    )
