"""KV that relays keep for choices that decode: what to ask of them, what to tell them. Pure.

The relay of the node where a prompt was read keeps a copy if it has room, says nothing of it, and forgets it when
it is told to or hears nothing of it for a lease. Whether there is a copy shows when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from dskv.handle import KvHandle, KvKey
from dsrouter.request import Choice, Phase
from dsrouter.workers import Worker, Workers
from dswire.messages import worker


class Keeping:
    """The router's side of kept KV."""

    def __init__(self, workers: Workers, send: Callable[[str, msgspec.Struct], None], *, on: bool) -> None:
        """``on``: whether relays keep any."""
        self._workers = workers
        self._send = send
        self._on = on

    def note(self, choice: Choice, handle: KvHandle) -> None:
        """KV of the choice was sealed: once it is handed over there may be a copy."""
        if self._on and choice.kept is None:
            choice.kept = (handle.key, handle.node)

    def at(self, choice: Choice) -> Worker | None:
        """The relay that may have a copy of what the choice decoded from."""
        if choice.kept is None or choice.life.phase is not Phase.DECODING:
            return None
        return self._relay(choice.kept[1])

    def ask(self, choice: Choice, relay: Worker) -> None:
        """Have the copy offered under the key of a new attempt."""
        assert choice.kept is not None
        self._send(relay.peer, worker.KvReoffer(choice.kept[0], choice.key))

    def drop(self, choice: Choice) -> None:
        """The copy is of no use any more."""
        if choice.kept is None:
            return
        (key, node), choice.kept = choice.kept, None
        relay = self._relay(node)
        if relay is not None:
            self._send(relay.peer, worker.Abort(key))

    def extend(self, choices: Iterable[Choice]) -> None:
        """Renew the leases of all copies."""
        wanted: dict[str, list[KvKey]] = {}
        for choice in choices:
            if choice.kept is not None:
                key, node = choice.kept
                wanted.setdefault(node, []).append(key)
        for node, keys in wanted.items():
            relay = self._relay(node)
            if relay is not None:
                self._send(relay.peer, worker.KvWanted(tuple(keys)))

    def _relay(self, node: str) -> Worker | None:
        return next((one for one in self._workers.role("relay") if one.hello.node == node), None)
