"""A worker's side of being registered: with the router, and with the relay of its node.

Pure: messages in, messages out. The hello is said again when the other side forgot us or was silent for its
lease, and every ``HELLO_RETRY_S`` until it is answered, since a connection that breaks takes what was sent with it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dswire.machine import Send

#: seconds between hellos while none was answered
HELLO_RETRY_S = 2.0


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
        self.forget(now)
        return [Send(self.peer, self._hello())]

    def forget(self, now: float) -> None:
        """Not registered any more; the next hello is due in ``HELLO_RETRY_S``."""
        self.lease_s = None
        self._heard_at = now

    def welcomed(self, now: float, lease_s: float) -> None:
        """The hello was answered."""
        self.lease_s = lease_s
        self._heard_at = now

    def heard(self, now: float) -> None:
        """Any message came from the other side."""
        self._heard_at = now

    def deadline(self) -> float:
        """When silence calls for another hello."""
        return self._heard_at + (HELLO_RETRY_S if self.lease_s is None else self.lease_s)

    def silent(self, now: float) -> bool:
        """Whether the other side has been silent for too long."""
        return now >= self.deadline()
