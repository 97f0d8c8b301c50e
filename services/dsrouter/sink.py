"""What the flow of choices tells the rest of the router."""

from __future__ import annotations

from typing import Protocol

import msgspec

from dsrouter.request import Choice, Request
from dswire.errors import DsError


class Sink(Protocol):
    """Who is told."""

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Send a message."""

    def emit(self, request: Request, event: msgspec.Struct) -> None:
        """An event of the request, for its client."""

    def choice_done(self, request: Request, choice: Choice, now: float) -> None:
        """The choice is complete."""

    def fail(self, request: Request, error: DsError, now: float) -> None:
        """The request has failed."""
