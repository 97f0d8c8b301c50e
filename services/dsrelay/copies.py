"""The memory of kept KV: one segment, made when the first copy comes, and one thread that copies into it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dskv.handle import KvHandle
from dskv.memory import RankPools, copy
from dskv.segment import Segment, SegmentCache
from dsrelay.events import CopyKept
from dswire.errors import DsError, ErrorInfo


class KeptMemory:
    """Copies into it, one at a time, off the event loop."""

    def __init__(self) -> None:
        self._owners = SegmentCache()
        self._segment: Segment | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keep")

    async def keep(self, action: CopyKept) -> ErrorInfo | None:
        """Copy what an owner holds; returns what was wrong."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._keep, action.handle, action.kept)
        except DsError as error:
            return error.info()
        return None

    def close(self) -> None:
        """Give the memory back, after what is under way."""
        self._thread.shutdown()
        self._owners.close()
        if self._segment is not None:
            self._segment.close()

    def _keep(self, handle: KvHandle, kept: KvHandle) -> None:
        source = RankPools.map(handle.layout, handle.shards, handle.segment_blocks, self._owners)
        target = self._pool(kept)
        if source.single is not None and target.single is not None:
            target.single.copy_from(source.single, handle.blocks, kept.blocks)
        else:
            # whole blocks: the checksum is over what lies behind the last token, too
            tokens = len(handle.blocks) * handle.layout.block_size
            copy(source, handle.blocks, target, kept.blocks, 0, tokens)

    def _pool(self, kept: KvHandle) -> RankPools:
        if self._segment is None:
            path = Path(kept.shards[0].segment)
            self._segment = Segment.create(path, kept.segment_blocks, kept.layout.block_nbytes)
        return RankPools.of(kept.layout, self._segment)
