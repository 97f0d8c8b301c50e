"""A prefill machine under a clock of its own."""

from __future__ import annotations

from dskv.handle import KvKey
from dskv.shards import shards
from dsprefill.events import Sealed
from dsprefill.state import PrefillConfig, PrefillState
from dswire.messages import kv, worker
from dswire.messages.client import Sampling
from support.handles import LAYOUT
from support.instance_desk import MODEL, InstanceDesk

POOL = shards(LAYOUT, 1, 1, ["/pool"])


class Desk(InstanceDesk[PrefillState]):
    """Its machine, its work."""

    step_s = 0.5

    def __init__(
        self,
        *,
        blocks: int = 16,
        max_queue: int = 4,
        max_batch: int = 4,
        target_tokens: int = 24,
        stages: int = 1,
        prefix_cache: bool = False,
        part_tokens: int = 0,
    ) -> None:
        capacity = worker.Capacity(blocks, LAYOUT)
        config = PrefillConfig(
            name="prefill-0",
            node="n0",
            incarnation="1",
            model=MODEL,
            capacity=capacity,
            eos_ids=frozenset({0}),
            shards=POOL,
            near=kv.PoolInfo(LAYOUT, POOL, blocks),
            max_queue=max_queue,
            max_batch=max_batch,
            max_batch_tokens=target_tokens,
            stages=stages,
            prefix_cache=prefix_cache,
            part_tokens=part_tokens,
        )
        super().__init__(PrefillState(config))

    def work(self, name: str, tokens: int = 6, output: tuple[int, ...] = (), max_tokens: int = 8) -> KvKey:
        key = KvKey(f"{name}/0", 0)
        how = Sampling(max_tokens=max_tokens)
        self.say("router", worker.PrefillWork(key, tuple(range(1, tokens + 1)), output, how))
        return key

    def offered(self, name: str = "r") -> KvKey:
        key = self.work(name)
        self.step(key)
        self.feed(Sealed(self.now, key, 99))
        return key
