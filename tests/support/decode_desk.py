"""A decode machine under a clock of its own."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyEnded
from dsdecode.sequence import Phase
from dsdecode.state import DecodeState
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import shards
from dssched.steps import Made, RunStep, Stepped
from dswire.errors import ErrorInfo
from dswire.machine import Received, Send, Tick
from dswire.messages import kv, worker
from dswire.messages.client import Sampling
from support.handles import LAYOUT

ActionT = TypeVar("ActionT")
MessageT = TypeVar("MessageT", bound=msgspec.Struct)

MODEL = worker.ModelIdentity("tiny", "f", "float16")
LEASE_S = 30.0


class Desk:
    """One machine under a clock of its own, validated after every event."""

    def __init__(
        self,
        *,
        blocks: int = 16,
        max_queue: int = 12,
        max_batch: int = 4,
        max_batch_tokens: int = 12,
        node: str = "n0",
        **settings: Any,
    ) -> None:
        capacity = worker.Capacity(blocks, LAYOUT)
        config = DecodeConfig(
            name="decode-0",
            node=node,
            incarnation="1",
            model=MODEL,
            capacity=capacity,
            eos_ids=frozenset({0}),
            max_queue=max_queue,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            **settings,
        )
        self.state = DecodeState(config)
        self.now = 100.0
        self.actions: list[Any] = []
        #: work and aborts that the router sent
        self.router_sent = 0

    def feed(self, event: Any) -> list[Any]:
        self.actions = self.state.handle(event)
        self.state.validate()
        return self.actions

    def say(self, peer: str, message: msgspec.Struct) -> list[Any]:
        self.router_sent += isinstance(message, worker.PrefillWork | worker.DecodeWork | worker.Abort)
        return self.feed(Received(self.now, peer, message))

    def ping(self) -> list[Any]:
        """The router's ping."""
        return self.say("router", worker.RouterPing(self.router_sent))

    def joined(self) -> Desk:
        self.feed(Tick(self.now))
        self.say("router", worker.WorkerWelcome("router-0", "1", 5.0))
        self.say("relay", kv.KvWelcome("relay-n0", "1", LEASE_S))
        return self

    def work(self, name: str, tokens: int = 6, max_tokens: int = 8, *, layout: KvLayout = LAYOUT) -> KvKey:
        """Work on a prompt of ``tokens`` tokens, to which prefill made one."""
        key = KvKey(f"{name}/0", 0)
        blocks = tuple(range(layout.blocks_for(tokens)))
        handle = KvHandle(key, "prefill-0", "n1", layout, tokens, blocks, shards(layout, 1, 1, ["/pool"]), 64, 99)
        prompt = tuple(range(1, tokens + 1))
        self.say("router", worker.DecodeWork(handle, prompt, (50,), Sampling(max_tokens=max_tokens)))
        return key

    def did(self, kind: type[ActionT]) -> list[ActionT]:
        return [action for action in self.actions if isinstance(action, kind)]

    def told(self, peer: str, kind: type[MessageT]) -> list[MessageT]:
        sends = [action for action in self.did(Send) if action.peer == peer]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def land(self, key: KvKey) -> list[Any]:
        """The whole KV comes directly."""
        self.say("relay", kv.KvGrant(key))
        return self.feed(CopyEnded(self.now, key))

    def running(self, name: str, tokens: int = 6, max_tokens: int = 8) -> KvKey:
        key = self.work(name, tokens, max_tokens)
        self.land(key)
        return key

    def step(self, *keys: KvKey, token: int = 7) -> list[Any]:
        return self.end(*(Made(key, token) for key in keys))

    def end(self, *made: Made, failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()) -> list[Any]:
        """The oldest step ends."""
        return self.feed(Stepped(self.now, min(self.state.steps), made, 0.25, failed))

    def read(self, name: str, tokens: int = 6, max_tokens: int = 8, *, first: int = 1) -> KvKey:
        """Work on a prompt that is to be read here."""
        key = KvKey(f"{name}/0", 0)
        prompt = tuple(range(first, first + tokens))
        self.say("router", worker.PrefillWork(key, prompt, (), Sampling(max_tokens=max_tokens)))
        return key

    def spans(self) -> list[tuple[str, int, int]]:
        """The step that was asked for: name of each sequence, first and last position."""
        (step,) = self.did(RunStep)
        return [(run.key.sequence[:-2], run.start, run.end) for run in step.runs]

    def phase(self, key: KvKey) -> Phase | None:
        one = self.state.sequences.get(key)
        return one.life.phase if one is not None else None

    def failures(self) -> list[tuple[KvKey, str]]:
        return [(one.key, one.error.code) for one in self.told("router", worker.SequenceFailed)]
