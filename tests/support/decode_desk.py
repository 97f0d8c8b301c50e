"""A decode machine under a clock of its own."""

from __future__ import annotations

from typing import Any

from dsdecode.config import DecodeConfig
from dsdecode.events import CopyEnded
from dsdecode.sequence import Phase
from dsdecode.state import DecodeState
from dskv.handle import KvHandle, KvKey
from dskv.layout import KvLayout
from dskv.shards import shards
from dssched.steps import RunStep
from dswire.messages import kv, worker
from dswire.messages.client import Sampling
from support.handles import LAYOUT
from support.instance_desk import MODEL, InstanceDesk


class Desk(InstanceDesk[DecodeState]):
    """Its machine, its work."""

    step_s = 0.25

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
        super().__init__(DecodeState(config))

    def work(self, name: str, tokens: int = 6, max_tokens: int = 8, *, layout: KvLayout = LAYOUT) -> KvKey:
        """Work on a prompt of ``tokens`` tokens, to which prefill made one."""
        key = KvKey(f"{name}/0", 0)
        blocks = tuple(range(layout.blocks_for(tokens)))
        handle = KvHandle(key, "prefill-0", "n1", layout, tokens, blocks, shards(layout, 1, 1, ["/pool"]), 64, 99)
        prompt = tuple(range(1, tokens + 1))
        self.say("router", worker.DecodeWork(handle, prompt, (50,), Sampling(max_tokens=max_tokens)))
        return key

    def land(self, key: KvKey) -> list[Any]:
        """The whole KV comes directly."""
        self.say("relay", kv.KvGrant(key))
        return self.feed(CopyEnded(self.now, key))

    def running(self, name: str, tokens: int = 6, max_tokens: int = 8) -> KvKey:
        key = self.work(name, tokens, max_tokens)
        self.land(key)
        return key

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
