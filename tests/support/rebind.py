"""To bind an address that was bound a moment ago."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from dswire.errors import PortInUse

ResultT = TypeVar("ResultT")

PATIENCE_S = 30.0


async def rebind(make: Callable[[], ResultT]) -> ResultT:
    """What ``make`` makes, as soon as it can: libzmq gives a port back some time after close, and tells nobody."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return make()
            except PortInUse:
                await asyncio.sleep(0.005)
