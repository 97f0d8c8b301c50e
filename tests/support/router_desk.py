"""A router machine under a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from typing import TypeVar

import msgspec

from dskv.handle import KvHandle, KvKey
from dskv.shards import shards
from dsrouter.config import RouterConfig
from dsrouter.state import Action, Event, RouterState
from dswire.machine import Received, Send
from dswire.messages import PROTOCOL, client, worker
from dswire.messages.client import Sampling, Submit
from support.handles import LAYOUT
from support.script import ScriptWriter

ActionT = TypeVar("ActionT")
MessageT = TypeVar("MessageT", bound=msgspec.Struct)

MODEL = worker.ModelIdentity("tiny", "f", "float16")
ROLES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
CLIENT = "client:c"
FOUR = Sampling(max_tokens=4)


class Desk:
    """One machine under a clock of its own, validated after every event."""

    def __init__(
        self,
        *,
        max_prefill_queue: int = 8,
        retries: int = 2,
        blocks: int = 16,
        mode: str = "disaggregated",
        threshold_tokens: int = 0,
        node_affinity: float = 0.0,
        max_decode_queue: int = 8,
        reach: Mapping[str, frozenset[str]] = MappingProxyType({}),
    ) -> None:
        config = RouterConfig(
            name="router-0",
            incarnation="1",
            model=MODEL,
            vocab_size=100,
            max_model_len=64,
            workers=ROLES,
            max_requests=8,
            max_prefill_queue=max_prefill_queue,
            max_decode_queue=max_decode_queue,
            max_deadline_s=600.0,
            client_lease_s=6.0,
            worker_lease_s=5.0,
            retries=retries,
            mode=mode,
            threshold_tokens=threshold_tokens,
            node_affinity=node_affinity,
            reach=reach,
        )
        # an early clock: a time of zero is a time like any other
        self.now = 0.0
        self.state = RouterState(config, ScriptWriter, Random(1), self.now)
        self.blocks = blocks
        self.actions: list[Action] = []
        self.say(CLIENT, client.ClientHello(PROTOCOL))

    def feed(self, event: Event) -> list[Action]:
        self.actions = self.state.handle(event)
        self.state.validate()
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Action]:
        return self.feed(Received(self.now, peer, message))

    def join(self, *names: str, node: str = "n0") -> Desk:
        for name in names:
            capacity = worker.Capacity(self.blocks, LAYOUT, keeps=True)
            self.say(name, worker.WorkerHello(PROTOCOL, name, ROLES[name], node, "1", MODEL, capacity))
        return self

    def submit(
        self, name: str = "r", tokens: int = 6, sampling: Sampling = FOUR, *, first: int = 0
    ) -> list[Action]:
        return self.say(CLIENT, Submit(name, prompt_ids=tuple(range(first, first + tokens)), sampling=sampling))

    def did(self, kind: type[ActionT]) -> list[ActionT]:
        return [action for action in self.actions if isinstance(action, kind)]

    def told(self, peer: str, kind: type[MessageT]) -> list[MessageT]:
        sends = [action for action in self.did(Send) if action.peer == peer]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def prefilled(self, key: KvKey, peer: str = "prefill-0") -> KvHandle:
        """A prefill instance makes the next token of a sequence and offers its KV."""
        self.say(peer, worker.PrefillDone(key, 7, 0.0, 0.0))
        handle = KvHandle(key, peer, "n0", LAYOUT, 6, (0, 1), shards(LAYOUT, 1, 1, ["/pool"]), 16, 99)
        self.say(peer, worker.KvSealed(handle))
        return handle


def only(works: list[worker.PrefillWork]) -> worker.PrefillWork:
    """The one piece of work that was told."""
    (work,) = works
    return work
