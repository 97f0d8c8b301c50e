"""What every pure core has in common: events in, actions out.

A machine has no clock, no socket and no loop: time arrives inside each event, and what is to be done leaves as
actions. The actor shell (``dswire.actor``) runs it in a server, the simulator under a virtual clock.

What is made for every token is a ``msgspec.Struct``, which takes a fifth of the time that a frozen dataclass takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec


class Received(msgspec.Struct, frozen=True):
    """A message came in."""

    now: float
    #: who sent it: a worker's name, ``client:...``, ``router``, ``relay``, ``relay:NODE``
    peer: str
    message: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Tick:
    """The machine's ``next_deadline`` has come."""

    now: float


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Nothing can be sent to this peer: its connection is gone, or its queue is full."""

    now: float
    peer: str


class Send(msgspec.Struct, frozen=True):
    """Send a message. It may be lost with its receiver; then ``PeerLost`` follows."""

    peer: str
    message: msgspec.Struct


class Machine(Protocol):
    """A service's pure core."""

    def handle(self, event: Any) -> Sequence[Any]:
        """Take one event; returns the actions in the order in which they are to be performed."""

    def next_deadline(self) -> float | None:
        """When to send a :class:`Tick`, in the events' clock; None for never."""

    def validate(self) -> None:
        """Check every invariant. Raises ``AssertionError``."""
