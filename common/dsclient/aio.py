"""The client for asyncio programs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from importlib import metadata
from types import TracebackType
from typing import Unpack

from dsclient.completion import Completion
from dsclient.connection import Connection
from dsclient.events import RequestAttached, RequestCancelled, RequestLeft, RequestOpened
from dsclient.request import SamplingFields, Turn, build_submit
from dsclient.stream import Stream
from dswire.errors import DuplicateRequest
from dswire.keys import CurveKeys
from dswire.messages.client import ClientWelcome, Sampling, StatusReport, Submit

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"


def agent() -> str:
    """Name and version of this software, as the router's log shows it."""
    try:
        return f"dsclient-python/{metadata.version('distserve')}"
    except metadata.PackageNotFoundError:
        return "dsclient-python"


class AsyncClient:
    """Talks to one router, for any number of requests at a time, in one event loop.

    Connects at first use. Every method may raise :class:`~dsclient.errors.RouterLost`, when the router does not
    answer within ``timeout_s``, and what the router refuses the connection with.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        keys: CurveKeys | None = None,
        timeout_s: float = 10.0,
        identity: str | None = None,
    ) -> None:
        """``keys`` are needed where the router is encrypted.

        ``identity`` names this client to the router and is random. A program that wants to :meth:`attach` to its
        requests after a crash takes the one of its earlier life; whoever knows it can read those requests.
        """
        self.identity = f"c-{secrets.token_hex(16)}" if identity is None else identity
        self._connection = Connection(address, self.identity, keys=keys, agent=agent(), timeout_s=timeout_s)

    async def connect(self) -> ClientWelcome:
        """Wait until the router has answered; tells what it serves. Other methods do not need it."""
        self._connection.open()
        return await self._connection.connected()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer to a prompt, given as text or as token ids.

        ``fields`` are sampling parameters, on top of ``sampling``. ``deadline_s``: seconds from now after which
        the request fails with ``DeadlineExceeded``. Cancelling the task cancels the request.
        """
        submit = build_submit(
            prompt=prompt,
            prompt_ids=prompt_ids,
            sampling=sampling,
            fields=fields,
            request_id=request_id,
            deadline_s=deadline_s,
        )
        return await self._submit(submit).result()

    async def chat(
        self,
        messages: Iterable[Turn],
        *,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Completion:
        """The whole answer to a conversation; otherwise like :meth:`generate`."""
        submit = build_submit(
            chat=messages, sampling=sampling, fields=fields, request_id=request_id, deadline_s=deadline_s
        )
        return await self._submit(submit).result()

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        request_id: str | None = None,
        deadline_s: float | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Stream:
        """The answer as it comes; otherwise like :meth:`generate`. The request is sent at once."""
        return self._submit(
            build_submit(
                prompt=prompt,
                prompt_ids=prompt_ids,
                sampling=sampling,
                fields=fields,
                request_id=request_id,
                deadline_s=deadline_s,
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
    ) -> Stream:
        """The answer to a conversation as it comes; otherwise like :meth:`generate`."""
        return self._submit(
            build_submit(
                chat=messages, sampling=sampling, fields=fields, request_id=request_id, deadline_s=deadline_s
            )
        )

    def attach(self, request_id: str) -> Stream:
        """Take up a running request of this client's identity, from its first event on.

        The stream raises :class:`~dsclient.errors.UnknownRequest` when the router does not know it.
        """
        stream = self._stream(request_id)
        self._connection.feed(RequestAttached(self._connection.now(), request_id))
        return stream

    async def cancel(self, request_id: str) -> None:
        """Stop a request of this identity; whoever reads it gets ``Cancelled``. No error if it has ended."""
        if not self._connection.state.is_open(request_id):
            await self.connect()
        self._connection.feed(RequestCancelled(self._connection.now(), request_id))

    async def status(self) -> StatusReport:
        """The router's view of the system."""
        self._connection.open()
        return await self._connection.status()

    async def close(self) -> None:
        """Leave; requests still open are cancelled. Twice is harmless."""
        self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _submit(self, submit: Submit) -> Stream:
        stream = self._stream(submit.request_id)
        self._connection.feed(RequestOpened(self._connection.now(), submit))
        return stream

    def _stream(self, request_id: str) -> Stream:
        self._connection.open()
        if self._connection.state.is_open(request_id):
            raise DuplicateRequest(f"{request_id}: is still open in this client")
        stream = Stream(request_id, self._connection.now(), self._leave)
        self._connection.add(stream)
        return stream

    def _leave(self, request_id: str) -> None:
        self._connection.feed(RequestLeft(self._connection.now(), request_id))
