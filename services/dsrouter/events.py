"""What goes in and out of the router machine, beside messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dswire.errors import ErrorInfo
from dswire.messages.client import Submit

# actions


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Turn the text of a request into tokens; ends with :class:`Tokenized`."""

    submit: Submit


@dataclass(frozen=True, slots=True)
class Note:
    """Write a line into the log, for whoever runs the system: workers that come and go, requests that it failed."""

    event: str
    #: what is told with it, by name
    about: Mapping[str, str]
    warning: bool = False


# events


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a request, or why there are none."""

    now: float
    #: what was tokenised, the very object: the request of that id may be another one by now
    submit: Submit
    prompt_ids: tuple[int, ...] = ()
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """The router is being shut down."""

    now: float
