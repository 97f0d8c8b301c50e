"""The router machine on real sockets and a real tokenizer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from random import SystemRandom
from typing import Any

import msgspec
import structlog
from zmq.auth.thread import ThreadAuthenticator

from dsengine.store import resolve
from dsengine.text import Text
from dsrouter.config import RouterConfig
from dsrouter.events import Note, Stopping, Tokenize, Tokenized
from dsrouter.state import CLIENT, RouterState
from dsrouter.writer import ChoiceWriter
from dstopology.resolved import Topology
from dstopology.wiring import model_identity, system_keys
from dswire.actor import Actor, Route
from dswire.errors import DsError, PromptTooLong, ProtocolError
from dswire.keys import start_authenticator
from dswire.messages import client, worker
from dswire.messages.client import Submit
from dswire.sockets import BoundSocket

log = structlog.get_logger()

#: longer prompts are tokenised in a thread, so that they hold up nobody's tokens; in characters
INLINE_CHARS = 16_384


class RouterActor(Actor):
    """Performs what the machine asks for."""

    machine: RouterState

    def __init__(
        self, machine: RouterState, routes: list[Route], text: Text, authenticator: ThreadAuthenticator | None
    ) -> None:
        super().__init__(machine, routes)
        self._text = text
        self._authenticator = authenticator

    def stopping(self) -> None:
        """Every request that still runs ends with an error that says why."""
        self.feed(Stopping(self.now()))

    def closed(self) -> None:
        """Stop the thread that checks keys."""
        if self._authenticator is not None:
            self._authenticator.stop()

    def perform(self, action: Any) -> None:
        """Perform one action of ``dsrouter.events``."""
        match action:
            case Tokenize(submit) if _chars(submit) <= INLINE_CHARS:
                self.soon(self._tokenize(submit))
            case Tokenize(submit):
                self.spawn(asyncio.to_thread(self._tokenize, submit), "tokenize")
            case Note(event, about, warning):
                # ids of requests are their clients' words
                told = {name: value if value.isprintable() else ascii(value) for name, value in about.items()}
                (log.warning if warning else log.info)(event, **told)
            case _:
                super().perform(action)

    def garbage(self, peer: str, error: ProtocolError) -> None:
        """Tell a client that its message could not be read; workers are ours, a log line does."""
        super().garbage(peer, error)
        if peer.startswith(CLIENT):
            self.send(peer, client.ClientRefused(error.info()))

    def _tokenize(self, submit: Submit) -> Tokenized:
        try:
            tokens = self._tokens(submit)
        except DsError as error:
            return Tokenized(self.now(), submit, error=error.info())
        return Tokenized(self.now(), submit, tuple(tokens))

    def _tokens(self, submit: Submit) -> list[int]:
        limit = self.machine.config.max_model_len * self._text.max_token_chars
        if _chars(submit) > limit:
            raise PromptTooLong(f"the prompt has {_chars(submit)} characters, no prompt above {limit} can fit")
        if submit.chat is not None:
            return self._text.render_chat([msgspec.structs.asdict(turn) for turn in submit.chat])
        return self._text.encode(submit.prompt or "")


def _chars(submit: Submit) -> int:
    return len(submit.prompt or "") + sum(len(turn.content) for turn in submit.chat or ())


async def build(topology: Topology, name: str, phase: Callable[[str], None]) -> RouterActor:
    """Wire the router."""
    phase("loading tokenizer")
    model_dir = resolve(topology.model.path)
    text = await asyncio.to_thread(Text, model_dir)
    router = topology.router
    identity = model_identity(topology, model_dir)
    config = RouterConfig.of(topology, uuid.uuid4().hex[:12], identity, text.vocab_size)
    keys = system_keys(topology)
    authenticator = start_authenticator(topology.security.keys_dir) if keys is not None else None
    routes = [
        Route(BoundSocket(router.frontend_bind, keys=keys), client.FromClient, prefix=CLIENT),
        Route(BoundSocket(router.backend_bind, keys=keys), worker.FromWorker),
    ]

    def make_writer(sampling: client.Sampling, prompt_ids: Sequence[int]) -> ChoiceWriter:
        return ChoiceWriter(text, sampling, prompt_ids)

    machine = RouterState(config, make_writer, SystemRandom(), Actor.now())
    return RouterActor(machine, routes, text, authenticator)
