"""Text of one choice as it grows: whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from dsengine.detokenizer import Detokenizer, StopStrings
from dsengine.text import Text
from dswire.messages.client import Sampling

#: tokens of the prompt that can matter for the text that follows
PROMPT_TAIL = 8


class ChoiceWriter:
    """The router's :class:`dsrouter.request.Writer` over a real tokenizer."""

    def __init__(self, text: Text, sampling: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        """The last of ``prompt_ids`` tell whether a first word begins with the space that its token implies."""
        self._text = text
        self._detokenizer = Detokenizer(text, prompt_ids[-PROMPT_TAIL:])
        self._stops = StopStrings(sampling.stop)

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is safe to send now, and whether a stop string was met."""
        safe, stop = self._stops.push(self._detokenizer.push([token]))
        return safe, stop is not None

    def flush(self) -> str:
        """The rest, at the end. A stop string that the rest completes is cut off too."""
        safe, stop = self._stops.push(self._detokenizer.flush())
        return safe if stop is not None else safe + self._stops.flush()

    def token_text(self, token: int) -> str:
        """Text of a single token, for log-probabilities."""
        return self._text.decode([token], skip_special_tokens=False)
