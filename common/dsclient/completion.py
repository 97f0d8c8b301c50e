"""What a request has come to: texts, tokens, usage, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from dswire.messages.client import Finished, Ledger, Output, TokenLogprob, Usage


class Choice(msgspec.Struct, frozen=True):
    """One answer to the prompt."""

    text: str
    token_ids: tuple[int, ...]
    #: one for each token when ``logprobs`` was asked for, else empty
    logprobs: tuple[TokenLogprob, ...]
    #: "stop" or "length"
    finish_reason: str


class Completion(msgspec.Struct, frozen=True):
    """A finished request. Times are seconds."""

    request_id: str
    #: in order; ``n`` of them
    choices: tuple[Choice, ...]
    usage: Usage
    #: where the time went, by the router's clock
    ledger: Ledger
    #: from the call to the arrival of the first output, by this client's clock
    ttft_s: float
    #: from the call to the arrival of the end, by this client's clock
    total_s: float

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text if self.choices else ""


@dataclass(slots=True)
class _Draft:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""

    def choice(self) -> Choice:
        return Choice("".join(self.text), tuple(self.token_ids), tuple(self.logprobs), self.finish_reason)


class CompletionBuilder:
    """Collects the outputs of one request. ``asked_at`` and ``now`` are of one monotonic clock, in seconds."""

    def __init__(self, request_id: str, asked_at: float) -> None:
        self._request_id = request_id
        self._asked_at = asked_at
        self._first_at: float | None = None
        self._drafts: dict[int, _Draft] = {}

    def add(self, now: float, output: Output) -> None:
        """The next output, of whichever choice."""
        if self._first_at is None:
            self._first_at = now
        draft = self._drafts.setdefault(output.choice, _Draft())
        draft.text.append(output.text)
        draft.token_ids += output.token_ids
        draft.logprobs += output.logprobs
        draft.finish_reason = output.finish_reason

    def finish(self, now: float, finished: Finished) -> Completion:
        """The whole."""
        first_at = now if self._first_at is None else self._first_at
        return Completion(
            request_id=self._request_id,
            choices=tuple(draft.choice() for _, draft in sorted(self._drafts.items())),
            usage=finished.usage,
            ledger=finished.ledger,
            ttft_s=first_at - self._asked_at,
            total_s=now - self._asked_at,
        )
