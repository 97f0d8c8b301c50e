"""Decode instances that read straight out of an owner's segment: the relay says when, and hears when it is done."""

from __future__ import annotations

from dskv.handle import KvHandle, KvKey
from dsrelay.events import Action
from dswire.errors import ErrorInfo
from dswire.machine import Send
from dswire.messages import kv


class DirectReaders:
    """The ledger's word to a decode instance of this node."""

    def __init__(self, out: list[Action]) -> None:
        self._out = out

    def granted(self, now: float, peer: str, handle: KvHandle) -> None:
        """Go ahead."""
        self._out.append(Send(peer, kv.KvGrant(handle.key)))

    def failed(self, now: float, peer: str, key: KvKey, error: ErrorInfo) -> None:
        """It cannot be had, or no more."""
        self._out.append(Send(peer, kv.KvFailed(key, error)))
