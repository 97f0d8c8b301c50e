"""What a step runs over: consecutive tokens of one sequence, and where its KV lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence: a whole prompt, a chunk of one, or the token that was drawn last."""

    tokens: Sequence[int]
    #: position of the first; the KV of all positions before it lies in ``blocks``
    start: int
    #: hold ``end`` tokens or more; only those of the span are written
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)
