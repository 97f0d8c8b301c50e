"""The client SDK: ask a running system for text, tokens, streams and its state.

    from dsclient import Client

    with Client() as client:
        for event in client.stream("The capital of France is", max_tokens=16, temperature=0):
            print(event.text, end="", flush=True)

:class:`AsyncClient` has the same methods for asyncio. Errors are typed: see :mod:`dsclient.errors`. Needs pyzmq,
msgpack and msgspec, nothing else. The protocol beneath is told in ``docs/protocol.md``.
"""

from dsclient import errors
from dsclient.aio import DEFAULT_ADDRESS, AsyncClient
from dsclient.blocking import BlockingStream, Client
from dsclient.completion import Choice, Completion
from dsclient.stream import Stream
from dswire.keys import CurveKeys, load_client, load_system
from dswire.messages.client import (
    ChatMessage,
    ClientWelcome,
    Ledger,
    Output,
    Sampling,
    StatusReport,
    TokenLogprob,
    Usage,
    WorkerStatus,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "BlockingStream",
    "ChatMessage",
    "Choice",
    "Client",
    "ClientWelcome",
    "Completion",
    "CurveKeys",
    "Ledger",
    "Output",
    "Sampling",
    "StatusReport",
    "Stream",
    "TokenLogprob",
    "Usage",
    "WorkerStatus",
    "errors",
    "load_client",
    "load_system",
]
