"""What the client machine is told and what it wants done; ``Received``, ``Tick``, ``Send`` come from dswire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dswire.errors import DsError
from dswire.machine import Received, Send, Tick
from dswire.messages.client import Accepted, ClientWelcome, Finished, Output, StatusReport, Submit


@dataclass(frozen=True, slots=True)
class ConnectAsked:
    """Somebody waits for the connection; ``ask`` names the answer."""

    now: float
    ask: str


@dataclass(frozen=True, slots=True)
class StatusAsked:
    """Somebody waits for a status report; ``ask`` names the answer."""

    now: float
    ask: str


@dataclass(frozen=True, slots=True)
class RequestOpened:
    """A new request. Its id must not be open."""

    now: float
    submit: Submit


@dataclass(frozen=True, slots=True)
class RequestAttached:
    """Take up a request that the router already knows, from its first event on. Its id must not be open."""

    now: float
    request_id: str


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Stop a request; whoever reads it learns so by its end."""

    now: float
    request_id: str


@dataclass(frozen=True, slots=True)
class RequestLeft:
    """Nobody reads this request any more: stop it, deliver nothing further."""

    now: float
    request_id: str


@dataclass(frozen=True, slots=True)
class Denied:
    """The transport was turned away: wrong keys."""

    now: float
    error: DsError


@dataclass(frozen=True, slots=True)
class Garbled:
    """The router sent what cannot be read."""

    now: float
    error: DsError


@dataclass(frozen=True, slots=True)
class Closed:
    """The client ends."""

    now: float


@dataclass(frozen=True, slots=True)
class Deliver:
    """The next event of a request, in order and once. After ``Finished`` nothing follows."""

    request_id: str
    event: Accepted | Output | Finished


@dataclass(frozen=True, slots=True)
class End:
    """A request has ended badly; nothing follows."""

    request_id: str
    error: DsError


@dataclass(frozen=True, slots=True)
class Answer:
    """What an ask has come to."""

    ask: str
    result: ClientWelcome | StatusReport | DsError


Event: TypeAlias = (
    Received
    | Tick
    | ConnectAsked
    | StatusAsked
    | RequestOpened
    | RequestAttached
    | RequestCancelled
    | RequestLeft
    | Denied
    | Garbled
    | Closed
)
Action: TypeAlias = Send | Deliver | End | Answer
