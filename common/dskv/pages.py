"""The pages of mirrors: had before a block is written, given back when too many lie idle.

A mirror is a sparse file beside a pool that other processes cannot map, with a place for each of its blocks. Only
blocks on their way from or to others need pages.

Invariant: what is held has pages; of what is not, ``spare`` blocks have some at most, the last to be let go. A
block that lies across pages shares those at its ends with its neighbours, which stay.
"""

from __future__ import annotations

from collections import Counter
from threading import Lock

from dskv.handle import KvKey
from dskv.memory import RankPools
from dswire.errors import DsError

#: pages of mirrors that are kept while nothing is in them: to have them anew takes several times the copy
SPARE_NBYTES = 1 << 30


class MirrorPages:
    """The pages of an instance's mirrors, those of all ranks. For use by any thread."""

    def __init__(self, mirrors: RankPools, spare: int) -> None:
        self._mirrors = mirrors
        self._spare = spare
        self._lock = Lock()
        #: who holds what, and how often each block is held
        self._holders: dict[KvKey, tuple[int, ...]] = {}
        self._held: Counter[int] = Counter()
        #: blocks with pages that nobody holds, in the order in which they were let go
        self._idle: dict[int, None] = {}

    def hold(self, key: KvKey, blocks: tuple[int, ...]) -> None:
        """Have pages for ``blocks`` until ``key`` lets them go.

        Raises :class:`TransferFailed` where there is no room, and holds nothing then.
        """
        with self._lock:
            assert key not in self._holders, "a key is handed over once at a time"
            missing = [block for block in blocks if not self._held[block] and block not in self._idle]
            try:
                self._mirrors.reserve(missing)
            except DsError:
                self._mirrors.discard(missing)
                raise
            self._holders[key] = blocks
            self._held.update(blocks)
            for block in blocks:
                self._idle.pop(block, None)

    def let_go(self, key: KvKey) -> None:
        """What ``key`` holds, if anything, is needed no longer; nor what its parts hold, if it is an attempt's."""
        with self._lock:
            keys = [one for one in self._holders if key in (one, one.attempt)]
            blocks = [block for one in keys for block in self._holders.pop(one)]
            self._held.subtract(blocks)
            for block in blocks:
                if not self._held[block]:
                    del self._held[block]
                    self._idle[block] = None
            excess = list(self._idle)[: max(len(self._idle) - self._spare, 0)]
            for block in excess:
                del self._idle[block]
            self._mirrors.discard(excess)
