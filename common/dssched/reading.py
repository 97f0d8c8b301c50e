"""A prompt on its way through an instance: how much of it is read, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskv.handle import KvKey
from dssched.prefix import PrefixPool
from dssched.steps import Run
from dswire.messages.worker import Logprobs, PrefillDone, PrefillWork


@dataclass(slots=True)
class Reading:
    """Prompt and output so far, of which the KV of the first ``done`` tokens is there or on its way."""

    work: PrefillWork
    #: prompt, and outputs made before
    tokens: tuple[int, ...]
    arrived: float
    done: int = 0
    #: set with the first step
    queue_s: float | None = None
    #: digests of its blocks, once they were asked for
    chain: list[bytes] | None = None

    @classmethod
    def of(cls, work: PrefillWork, now: float) -> Reading:
        """Nothing of it is read."""
        tokens = (*work.prompt_ids, *work.output_ids) if work.output_ids else work.prompt_ids
        return cls(work, tokens, now)

    @property
    def key(self) -> KvKey:
        """Of the sequence."""
        return self.work.key

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.tokens) - self.done

    def known(self, pool: PrefixPool) -> list[int]:
        """The blocks in ``pool`` with which it could begin."""
        if self.chain is None:
            self.chain = pool.chain(self.tokens)
        return pool.known(self.chain)

    def take(self, pool: PrefixPool, count: int, known: Sequence[int]) -> list[int]:
        """Take ``count`` blocks that begin with ``known``, whose tokens count as read."""
        self.done = len(known) * pool.block_size
        pool.asked += len(self.tokens)
        pool.found += self.done
        return pool.take(count, known)

    def read(self, count: int, blocks: Sequence[int], now: float) -> Run:
        """The next ``count`` tokens as part of a step that begins now."""
        if self.queue_s is None:
            self.queue_s = now - self.arrived
        start, self.done = self.done, self.done + count
        return Run(self.key, self.tokens[start : self.done], start, tuple(blocks), self.left == 0)

    def told(self, token: int, logprobs: Logprobs | None, reason: str, now: float) -> PrefillDone:
        """What the router is told of the token drawn behind the last of them; ``reason`` as in ``finish``."""
        assert self.queue_s is not None
        prefill_s = now - self.arrived - self.queue_s
        return PrefillDone(self.key, token, self.queue_s, prefill_s, logprobs, reason)
