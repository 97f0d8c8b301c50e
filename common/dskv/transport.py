"""The one interface behind which KV comes to a reader, whichever way it takes.

Shared memory is here; streams between hosts are in ``dskv.stream``, communicators of torch.distributed in
``dsengine.collective``. All bytes go through a :class:`Receiver`, so what proves them is the same for all.
"""

from __future__ import annotations

from typing import Protocol

from dskv.handle import KvHandle
from dskv.memory import RankPools
from dskv.receive import Receiver
from dskv.segment import SegmentCache


class Transport(Protocol):
    """The KV of one handle, on its way. One thread brings; :meth:`cut` may come from another."""

    def bring(self, receiver: Receiver) -> None:
        """Hand ``receiver`` all that it needs; every wait has a bound. Raises :class:`TransferFailed`."""
        ...

    def cut(self) -> None:
        """Nobody wants the rest: whoever waits in :meth:`bring` is told so at once."""
        ...


class SharedMemory:
    """Straight from the owner's pools, which this process maps."""

    def __init__(self, handle: KvHandle, mapped: SegmentCache) -> None:
        """``mapped``: the pools of other processes that are mapped already."""
        self._handle = handle
        self._mapped = mapped

    def bring(self, receiver: Receiver) -> None:
        """Copy; that takes as long as memory does."""
        handle = self._handle
        receiver.copy_direct(RankPools.map(handle.layout, handle.shards, handle.segment_blocks, self._mapped))

    def cut(self) -> None:
        """A copy is over before anybody could be told."""
