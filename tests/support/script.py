"""A model made of a table: the token of a sequence at a place is a hash of both, whatever came before.

So a sequence that is resumed after a lost attempt must go on with exactly the tokens of one that never stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from dswire.messages.client import Sampling

VOCAB = 1_000
EOS = 0
#: tokens below are never scripted but by ``Script.ends``
_FIRST = 10


class Script:
    """Which token comes where."""

    def __init__(self) -> None:
        #: sequence -> position at which the model says :data:`EOS`
        self.ends: dict[str, int] = {}

    def token(self, sequence: str, position: int) -> int:
        """The output token of ``sequence`` at ``position``, from 0."""
        if self.ends.get(sequence) == position:
            return EOS
        return _FIRST + zlib.crc32(f"{sequence}@{position}".encode()) % (VOCAB - _FIRST)

    def output(self, sequence: str, length: int) -> list[int]:
        """The first ``length`` output tokens."""
        return [self.token(sequence, position) for position in range(length)]


class ScriptWriter:
    """The router's writer over such tokens: each is the text ``<token>``."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self._stops = sampling.stop

    def push(self, token: int) -> tuple[str, bool]:
        """Text, and whether it is a stop string."""
        text = self.token_text(token)
        return ("", True) if text in self._stops else (text, False)

    def flush(self) -> str:
        """Nothing is ever held back."""
        return ""

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return f"<{token}>"
