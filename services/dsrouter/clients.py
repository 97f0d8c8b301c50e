"""The clients that the router knows, and whether they can be reached. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Client:
    """One client; its lease runs from ``heard_at``."""

    peer: str
    heard_at: float
    #: False after a send failed, until it is heard again
    reachable: bool = True
    #: its requests whose end is not forgotten yet
    requests: set[str] = field(default_factory=set)


class Clients:
    """All clients whose lease runs."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._all: dict[str, Client] = {}

    def get(self, peer: str) -> Client | None:
        """The client behind a connection."""
        return self._all.get(peer)

    def hello(self, now: float, peer: str) -> None:
        """A client said hello, for the first time or again."""
        self._all.setdefault(peer, Client(peer, now))
        self.heard(now, peer)

    def heard(self, now: float, peer: str) -> Client | None:
        """Anything came from the client; None when it is not known."""
        client = self._all.get(peer)
        if client is not None:
            client.heard_at = now
            client.reachable = True
        return client

    def unreachable(self, peer: str) -> None:
        """Nothing can be sent there now; the lease decides whether it comes back."""
        client = self._all.get(peer)
        if client is not None:
            client.reachable = False

    def leave(self, peer: str) -> Client | None:
        """Forget a client."""
        return self._all.pop(peer, None)

    def forgive(self, now: float, seconds: float) -> None:
        """Every lease runs so much longer."""
        for client in self._all.values():
            client.heard_at = min(now, client.heard_at + seconds)

    def silent(self, now: float) -> list[Client]:
        """Clients whose lease is over."""
        return [client for client in self._all.values() if now - client.heard_at > self.lease_s]
