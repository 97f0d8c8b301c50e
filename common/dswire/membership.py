"""A worker's side of being registered: with the router, and with the relay of its node.

Pure: messages in, messages out. The hello needs no retry while the connection is being made, since a connected
socket queues it; it is said again when the other side forgot us or was silent for its lease.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dswire.machine import Send


class Membership:
    """Whether ``peer`` knows us."""

    def __init__(self, peer: str, hello: Callable[[], msgspec.Struct]) -> None:
        self.peer = peer
        self._hello = hello
        #: None until registered
        self.lease_s: float | None = None
        self._heard_at = 0.0

    @property
    def joined(self) -> bool:
        """Whether the other side knows us."""
        return self.lease_s is not None

    def hello(self, now: float) -> list[Send]:
        """Say hello."""
        self.lease_s = None
        self._heard_at = now
        return [Send(self.peer, self._hello())]

    def welcomed(self, now: float, lease_s: float) -> None:
        """The hello was answered."""
        self.lease_s = lease_s
        self._heard_at = now

    def heard(self, now: float) -> None:
        """Any message came from the other side."""
        self._heard_at = now

    def deadline(self) -> float | None:
        """When silence means loss."""
        return None if self.lease_s is None else self._heard_at + self.lease_s

    def silent(self, now: float) -> bool:
        """Whether the other side has been silent for its lease."""
        deadline = self.deadline()
        return deadline is not None and now >= deadline
