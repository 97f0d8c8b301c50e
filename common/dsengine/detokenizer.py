"""From tokens that arrive a few at a time to text that can be shown at once.

Invariant: whatever the chunks are, everything that :meth:`Detokenizer.push` returned plus
:meth:`Detokenizer.flush` is exactly ``text.decode`` of all ids. So text is given out when no later token can
change it, and not before: half a character waits for its other half. :class:`StopStrings` keeps the same
promise for what must not be shown: the result depends on the text alone, not on how it was cut.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, Protocol

from dsengine.text import Text
from dswire.errors import InvalidRequest, UnsupportedModel

#: decoders whose output for a token depends on nothing but the token and whether it is the first
_LOCAL_DECODERS = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies. Source: ``bytes_to_unicode`` of GPT-2."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """The text of one sequence as it grows. A push costs time in proportion to its tokens, not to all so far.

    ``prompt_tail`` are the prompt's last ids: with them, the first word keeps the space before it in vocabularies
    that drop the space of a text's first token, and the invariant holds for the text after the tail.
    Raises :class:`UnsupportedModel` when the tokenizer's decoder is of a kind that cannot be followed step by step.
    """

    def __init__(self, text: Text, prompt_tail: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        skipped = text.special_ids if skip_special_tokens else frozenset()
        self._steps: _Steps
        if [each["type"] for each in _decoders(text)] == ["ByteLevel"]:
            self._steps = _ByteSteps(text, skipped)
        else:
            _check_local(text)
            self._steps = _WindowSteps(text, prompt_tail, skipped)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` complete; may be empty."""
        return self._steps.push(token_ids)

    def flush(self) -> str:
        """What is left when no more tokens come: bytes that never became a character come out as U+FFFD."""
        return self._steps.flush()


class _Steps(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class _ByteSteps:
    """Byte-level vocabularies: a token is some bytes, and the text is the UTF-8 of all of them."""

    def __init__(self, text: Text, skipped: frozenset[int]) -> None:
        self._tokenizer = text.tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, token_ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[letter] for letter in token)
        except KeyError:
            # a token that was added later is written as it is, not in the byte alphabet
            return token.encode()


class _WindowSteps:
    """Other vocabularies: decode the new tokens behind an old one, and give out what they add.

    A character may be spelled in byte tokens (``<0xE2>``), and the text of a row of them is known when the row
    ends: one bad byte spoils the whole row.
    """

    def __init__(self, text: Text, prompt_tail: Sequence[int], skipped: frozenset[int]) -> None:
        self._text = text
        self._skipped = skipped
        #: the last token that is given out and not empty; stands for "this is not the beginning"
        self._before: list[int] = []
        self._waiting: list[int] = []
        self.push(prompt_tail)
        self._waiting.clear()

    def push(self, token_ids: Sequence[int]) -> str:
        self._waiting += [each for each in token_ids if each not in self._skipped and self._token(each) is not None]
        ready = len(self._waiting)
        while ready and _is_byte(self._token(self._waiting[ready - 1])):
            ready -= 1
        return self._give(ready)

    def flush(self) -> str:
        return self._give(len(self._waiting))

    def _give(self, ready: int) -> str:
        given, self._waiting = self._waiting[:ready], self._waiting[ready:]
        known = self._decode(self._before)
        added = self._decode(self._before + given)[len(known) :]
        self._before = next(([each] for each in reversed(given) if self._token(each)), self._before)
        return added

    def _decode(self, token_ids: list[int]) -> str:
        return self._text.decode(token_ids, skip_special_tokens=False)

    def _token(self, token_id: int) -> str | None:
        return self._text.tokenizer.id_to_token(token_id)


class StopStrings:
    """Watches a text for strings that end it, and keeps back what may be the beginning of one.

    The stop string that is complete first wins; of those that end at the same character, the longest. Raises
    :class:`InvalidRequest` for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidRequest("a stop string is empty", remedy="leave it out")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        #: the stop string that was found
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """``(safe, stop)``: text that can be shown now, and the stop string once it was met (nothing follows)."""
        if self.found is not None:
            return "", self.found
        whole = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return whole[:start], self.found
        held = self._beginning(whole)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held], None

    def flush(self) -> str:
        """What was kept back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, whole: str) -> int:
        """Length of the longest end of ``whole`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(whole)), 0, -1):
            tail = whole[len(whole) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _is_byte(token: str | None) -> bool:
    return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _decoders(text: Text) -> list[dict[str, Any]]:
    """The settings of the tokenizer's decoders, in order."""
    decoder = text.tokenizer.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    listed: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return listed


def _check_local(text: Text) -> None:
    for each in _decoders(text):
        strips_more = each["type"] == "Strip" and (each["start"] > 1 or each["stop"] > 0)
        if each["type"] not in _LOCAL_DECODERS or strips_more:
            raise UnsupportedModel(f"the tokenizer's decoder {each} cannot be followed token by token")
