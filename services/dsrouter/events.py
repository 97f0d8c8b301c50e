"""What goes in and out of the router machine, beside messages."""

from __future__ import annotations

from dataclasses import dataclass

from dswire.errors import ErrorInfo
from dswire.messages.client import Submit

# actions


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Turn the text of a request into tokens; ends with :class:`Tokenized`."""

    request_id: str
    submit: Submit


# events


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a request, or why there are none."""

    now: float
    request_id: str
    prompt_ids: tuple[int, ...] = ()
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """The router is being shut down."""

    now: float
