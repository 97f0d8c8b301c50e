"""How a sequence comes by its KV: one handle after the other is asked of the relay, and copied.

On one host the copy begins before the relay's word, its checksum being the proof; it is made again once the word
has come if it does not fit. What came wrong, or not as a whole, is asked for once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsdecode.events import CopyDirect, CopyEnded, CopyStream
from dsdecode.sequence import Phase, Sequence
from dskv.handle import KvKey
from dswire.errors import ErrorInfo, KvCorrupt, TransferFailed
from dswire.links import RELAY, Links
from dswire.machine import Send
from dswire.messages import kv

#: what a copy may end with once, and is tried again from the source
_ONCE_MORE = (KvCorrupt.code, TransferFailed.code)


class Pulls:
    """The pulls of sequences that are PULLING, at most one of each at a time."""

    def __init__(self, node: str, block_size: int, links: Links, act: Callable[[Any], None]) -> None:
        """``node``, ``block_size``: of the instance; ``act``: takes actions."""
        #: copied and verified before the relay's word came
        self.unanswered: set[KvKey] = set()
        self._node = node
        self._block_size = block_size
        self._links = links
        self._act = act

    def begin(self, one: Sequence, now: float) -> None:
        """Pull the next handle."""
        handle = one.handle
        one.granted = one.again = False
        one.pull_at = one.heard_at = now
        if self._links.early and handle.node == self._node:
            one.early = True
            self._copy(one)
        self._act(Send(RELAY, kv.KvPull(handle)))

    def granted(self, one: Sequence | None, grant: kv.KvGrant, now: float) -> None:
        """The relay's word; ``one``: the sequence that waits for it, if any does."""
        if grant.key in self.unanswered:
            self.unanswered.discard(grant.key)
            self._act(Send(RELAY, kv.KvPulled(grant.key)))
        if one is not None:
            one.granted, one.heard_at = True, now
            if not one.copies:
                self._copy(one, grant.ticket)

    def ended(self, one: Sequence, event: CopyEnded) -> bool | ErrorInfo:
        """A copy is over: whether the handle's KV is here; or why it will never be."""
        now, key, error = event.now, event.key, event.error
        one.copies -= 1
        early, one.early = one.early, False
        if one.life.phase is Phase.DOOMED:
            return False
        if error is None:
            one.came(now)
            if early and not one.granted:
                self.unanswered.add(key)
            else:
                self._act(Send(RELAY, kv.KvPulled(key)))
            return True
        if early:
            if one.granted:
                self._copy(one)
            return False
        if error.code in _ONCE_MORE and not one.again:
            one.again, one.heard_at = True, now
            self._act(Send(RELAY, kv.KvAgain(key)))
            return False
        self._act(Send(RELAY, kv.KvPulled(key, error)))
        return error

    def _copy(self, one: Sequence, ticket: kv.Ticket | None = None) -> None:
        handle, size = one.handle, self._block_size
        blocks = one.blocks[handle.start // size : -(-handle.end // size)]
        one.copies += 1
        self._act(CopyDirect(handle, blocks) if ticket is None else CopyStream(handle, blocks, ticket))
