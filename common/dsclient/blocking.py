"""The client for programs without asyncio: an ``AsyncClient`` in a loop of its own, in one background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar, Unpack

from dsclient.aio import DEFAULT_ADDRESS, AsyncClient
from dsclient.completion import Completion
from dsclient.request import SamplingFields, Turn
from dsclient.stream import Stream
from dswire.errors import InvalidRequest
from dswire.keys import CurveKeys
from dswire.messages.client import ClientWelcome, Output, Sampling, StatusReport

ResultT = TypeVar("ResultT")

#: seconds that calls of other threads have to end when the client is closed
STOP_LIMIT_S = 2.0


def _settle(task: asyncio.Task[ResultT], outcome: Future[ResultT]) -> None:
    if task.cancelled():
        outcome.cancel()
    elif outcome.set_running_or_notify_cancel():
        if (error := task.exception()) is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())


class _LoopThread:
    """A thread that runs an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dsclient", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether work can be run there."""
        return self._thread.is_alive()

    def wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run ``work`` there; an interrupt here (Ctrl-C) cancels it there."""
        if not self.alive:
            work.close()
            raise InvalidRequest("the client is closed", remedy="make a new client")
        outcome: Future[ResultT] = Future()
        # made before anything starts: wherever in these lines an interrupt strikes, there is something to cancel
        try:
            self._loop.call_soon_threadsafe(self._start, work, outcome)
            return outcome.result()
        finally:
            outcome.cancel()

    def _start(self, work: Coroutine[Any, Any, ResultT], outcome: Future[ResultT]) -> None:
        task = self._loop.create_task(work)
        task.add_done_callback(lambda task: _settle(task, outcome))
        outcome.add_done_callback(lambda _: outcome.cancelled() and self._loop.call_soon_threadsafe(task.cancel))

    def stop(self) -> None:
        """End loop and thread. Twice is harmless."""
        if self.alive:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._until_stopped())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        # other threads may still be on their way out of a call that the close has ended
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=STOP_LIMIT_S)


class BlockingStream:
    """An iterator of :class:`~dswire.messages.client.Output`; made by ``Client.stream``.

    To leave ``for`` early, by ``break`` or an exception, cancels the request, as :meth:`close` and the end of
    ``with`` do. Afterwards :meth:`result` tells the whole.
    """

    def __init__(self, stream: Stream, thread: _LoopThread) -> None:
        self.request_id = stream.request_id
        self._stream = stream
        self._thread = thread

    def __iter__(self) -> Iterator[Output]:
        """Iterate; an iterator left early cancels the request."""
        try:
            while batch := self._thread.wait(self._stream.take()):
                yield from batch
        finally:
            self.close()

    def __next__(self) -> Output:
        """The next output, without a promise to take another."""
        batch = self._thread.wait(self._stream.take(1))
        if not batch:
            raise StopIteration
        return batch[0]

    def result(self) -> Completion:
        """Wait for the end and return the whole answer. Raises the request's error."""
        return self._thread.wait(self._stream.result())

    def close(self) -> None:
        """Cancel the request unless it has ended. Twice is harmless."""
        if not self._stream.ended:
            self._thread.wait(self._stream.aclose())

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """Talks to one router; the methods are those of :class:`~dsclient.aio.AsyncClient`, and may be used from any
    number of threads at a time."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        keys: CurveKeys | None = None,
        timeout_s: float = 10.0,
        identity: str | None = None,
    ) -> None:
        """See :class:`~dsclient.aio.AsyncClient`."""
        self._client = AsyncClient(address, keys=keys, timeout_s=timeout_s, identity=identity)
        self._thread = _LoopThread()

    @property
    def identity(self) -> str:
        """What names this client to the router."""
        return self._client.identity

    def connect(self) -> ClientWelcome:
        """Wait until the router has answered; tells what it serves. Other methods do not need it."""
        return self._thread.wait(self._client.connect())

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer to a prompt, given as text or as token ids. An interrupt cancels the request."""
        return self._thread.wait(
            self._client.generate(
                prompt,
                prompt_ids=prompt_ids,
                sampling=sampling,
                request_id=request_id,
                deadline_s=deadline_s,
                **fields,
            )
        )

    def chat(
        self,
        messages: Iterable[Turn],
        *,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer to a conversation; otherwise like :meth:`generate`."""
        return self._thread.wait(
            self._client.chat(messages, sampling=sampling, request_id=request_id, deadline_s=deadline_s, **fields)
        )

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> BlockingStream:
        """The answer as it comes; otherwise like :meth:`generate`. The request is sent at once."""
        return self._start(
            lambda: self._client.stream(
                prompt,
                prompt_ids=prompt_ids,
                sampling=sampling,
                request_id=request_id,
                deadline_s=deadline_s,
                **fields,
            )
        )

    def stream_chat(
        self,
        messages: Iterable[Turn],
        *,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> BlockingStream:
        """The answer to a conversation as it comes; otherwise like :meth:`generate`."""
        return self._start(
            lambda: self._client.stream_chat(
                messages, sampling=sampling, request_id=request_id, deadline_s=deadline_s, **fields
            )
        )

    def attach(self, request_id: str) -> BlockingStream:
        """Take up a running request of this client's identity, from its first event on."""
        return self._start(lambda: self._client.attach(request_id))

    def cancel(self, request_id: str) -> None:
        """Stop a request of this identity; whoever reads it gets ``Cancelled``. No error if it has ended."""
        self._thread.wait(self._client.cancel(request_id))

    def status(self) -> StatusReport:
        """The router's view of the system."""
        return self._thread.wait(self._client.status())

    def close(self) -> None:
        """Leave; requests still open are cancelled. Twice is harmless."""
        if self._thread.alive:
            self._thread.wait(self._client.close())
            self._thread.stop()

    def __enter__(self) -> Client:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, make: Callable[[], Stream]) -> BlockingStream:
        async def start() -> Stream:
            return make()

        return BlockingStream(self._thread.wait(start()), self._thread)
