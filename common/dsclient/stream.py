"""The answer to one request, as it comes.

A stream ends exactly once: with its completion, or with a typed error that every later look at it raises again.
It holds back nothing and is bounded by the request: at most ``n * max_tokens`` events can be waiting in it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from dsclient.completion import Completion, CompletionBuilder
from dswire.errors import Cancelled, DsError
from dswire.messages.client import Accepted, Finished, Output


class Stream:
    """An async iterator of :class:`~dswire.messages.client.Output`; made by ``AsyncClient.stream``.

    To leave ``async for`` early, by ``break``, an exception or the task's cancellation, cancels the request, as
    ``aclose`` and the end of ``async with`` do. Afterwards :meth:`result` tells the whole.
    """

    def __init__(self, request_id: str, asked_at: float, leave: Callable[[str], None]) -> None:
        """``leave`` tells the connection that nobody reads this request any more."""
        self.request_id = request_id
        #: tokens of the prompt; None until the request is accepted
        self.prompt_tokens: int | None = None
        self._leave = leave
        self._builder = CompletionBuilder(request_id, asked_at)
        self._waiting: deque[Output] = deque()
        self._end: Completion | DsError | None = None
        #: set while there is something to look at: an output or the end
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the request has come to its end; outputs may still be waiting here."""
        return self._end is not None

    def __aiter__(self) -> AsyncIterator[Output]:
        """Iterate; an iterator left early cancels the request."""
        return self._each()

    async def __anext__(self) -> Output:
        """The next output, without a promise to take another."""
        batch = await self.take(1)
        if not batch:
            raise StopAsyncIteration
        return batch[0]

    async def take(self, most: int | None = None) -> list[Output]:
        """Wait for outputs and return those that are there, ``most`` at most; none at the end. Raises its error."""
        while not self._waiting and self._end is None:
            self._news.clear()
            await self._news.wait()
        if self._waiting:
            count = len(self._waiting) if most is None else min(most, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]
        if isinstance(self._end, DsError):
            raise self._end
        return []

    async def result(self) -> Completion:
        """Wait for the end and return the whole answer. Raises the request's error.

        Outputs not looked at yet stay there. A cancelled ``result`` cancels the request.
        """
        try:
            while self._end is None:
                self._news.clear()
                await self._news.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(self._end, DsError):
            raise self._end
        return self._end

    def close(self) -> None:
        """Cancel the request unless it has ended. Twice is harmless."""
        if self._end is None:
            self._leave(self.request_id)
            self.fail(Cancelled(f"{self.request_id}: its reader left before the end"))

    async def aclose(self) -> None:
        """The same as :meth:`close`, under the name that async iterators have."""
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def feed(self, now: float, event: Accepted | Output | Finished) -> None:
        """Called by the connection: the next event, which came at ``now``."""
        if self._end is not None:
            return
        if isinstance(event, Accepted):
            self.prompt_tokens = event.prompt_tokens
            return
        if isinstance(event, Output):
            self._builder.add(now, event)
            self._waiting.append(event)
        else:
            self._end = self._builder.finish(now, event)
        self._news.set()

    def fail(self, error: DsError) -> None:
        """Called by the connection: the request has ended badly. The first end counts."""
        if self._end is None:
            self._end = error
            self._news.set()

    async def _each(self) -> AsyncIterator[Output]:
        try:
            while batch := await self.take(1):
                yield batch[0]
        finally:
            self.close()
