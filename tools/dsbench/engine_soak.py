"""``dsbench engine --soak``: many small requests through one engine, and what memory it holds afterwards.

Requests come and go in one batch as in a service: prompts whole or in two chunks beside decode steps, greedy and
drawn tokens, every seventh cancelled half-way. Blocks come from the pool that prefill instances use.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from dsengine.config import EngineConfig
from dsengine.runner import Engine, StepItem
from dsengine.sampler import Sampled, SamplerState
from dssched.prefix import PrefixPool
from dswire.messages.client import Sampling

BLOCK = 16
#: sequences at once, and blocks of the pool: more than they can fill
BATCH, BLOCKS = 8, 64
#: a prompt has 1 to so many tokens, an answer too
PROMPT, ANSWER = 24, 8
#: of some prompts that a step reads
CHUNK = 16
#: of all requests, those after which memory is first looked at: by then every kind of step has been
WARM_UP = 0.1
#: what the process may have grown from there to the end
ALLOWED_NBYTES = 16 << 20
_GREEDY = Sampling(temperature=0, ignore_eos=True)
_DRAWN = Sampling(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3, ignore_eos=True)
#: in a file of shared memory as an instance's pool is, where there is any
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Soaked:
    """What came out; field by field the JSON."""

    requests: int
    steps: int
    seconds: float
    #: of an engine in a process that has all libraries: the first one may have to pack the weights, the second not
    first_load_seconds: float
    load_seconds: float
    #: memory of this process alone, resident or swapped, after the warm-up and at the end; files and what is shared
    #: are no part of it
    warm_private_nbytes: int
    private_nbytes: int
    #: at the end; of that, what other processes may share
    resident_nbytes: int
    shared_nbytes: int
    allowed_growth_nbytes: int
    blocks_held: int
    #: of the KV pool's memory, and as its configuration has it
    pool_nbytes: int
    configured_pool_nbytes: int

    @property
    def failures(self) -> list[str]:
        """What is not as it has to be."""
        growth = self.private_nbytes - self.warm_private_nbytes
        problems = (
            (growth > self.allowed_growth_nbytes, f"memory grew by {growth} bytes"),
            (self.blocks_held > 0, f"{self.blocks_held} blocks are held by nobody's request"),
            (self.pool_nbytes != self.configured_pool_nbytes, f"the KV pool has {self.pool_nbytes} bytes"),
        )
        return [text for wrong, text in problems if wrong]

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        return {**asdict(self), "failures": self.failures}


@dataclass(slots=True)
class _Request:
    number: int
    tokens: list[int]
    prompt: int
    blocks: list[int]
    sampler: SamplerState
    #: tokens that it is still to get
    left: int
    #: tokens whose KV is there
    done: int = 0
    item: StepItem = field(init=False)

    def next_item(self) -> StepItem:
        """What the next step does for it."""
        chunk = CHUNK if self.number % 3 else PROMPT
        end = min(len(self.tokens), self.done + chunk)
        sampler = self.sampler if end == len(self.tokens) else None
        self.item = StepItem(self.tokens[self.done : end], self.done, self.blocks, sampler)
        return self.item

    def ends_with(self, sampled: Sampled | None) -> bool:
        """Note that the step is done; whether that was the last one."""
        self.done = self.item.end
        if sampled is not None:
            self.tokens.append(sampled.token)
            self.left -= 1
        cancelled = self.number % 7 == 0 and self.done > self.prompt
        return self.left == 0 or cancelled


def soak(model: Path, dtype: str, threads: int, requests: int, tell: Callable[[int], None]) -> Soaked:
    """Run; ``tell`` hears how many requests have ended. Raises what :class:`Engine` raises."""
    with tempfile.TemporaryDirectory(dir=_SHM if _SHM.is_dir() else None, prefix="ds-soak-") as folder:
        first_s = _time_of_loading(model, dtype, threads, Path(folder) / "pool.kv")
        engine, load_s = _loaded(model, dtype, threads, Path(folder) / "pool.kv")
        try:
            return _run(engine, requests, tell, (first_s, load_s))
        finally:
            engine.close()


def _run(engine: Engine, requests: int, tell: Callable[[int], None], load_s: tuple[float, float]) -> Soaked:
    pool, begin = PrefixPool(BLOCKS, BLOCK, keep=False), time.perf_counter()
    segment = engine.pool.segment
    assert segment is not None
    segment.warmed(60.0)
    steps, warm = 0, None
    for ended in _steps(engine, pool, requests):
        steps += 1
        tell(ended)
        if warm is None and ended >= requests * WARM_UP:
            warm = _memory()
    memory = _memory()
    assert warm is not None
    return Soaked(
        requests=requests,
        steps=steps,
        seconds=time.perf_counter() - begin,
        first_load_seconds=load_s[0],
        load_seconds=load_s[1],
        warm_private_nbytes=_private(warm),
        private_nbytes=_private(memory),
        resident_nbytes=memory["VmRSS"],
        shared_nbytes=memory["RssFile"] + memory["RssShmem"],
        allowed_growth_nbytes=ALLOWED_NBYTES,
        blocks_held=pool.held,
        pool_nbytes=segment.path.stat().st_size,
        configured_pool_nbytes=BLOCKS * engine.layout.block_nbytes,
    )


def _steps(engine: Engine, pool: PrefixPool, requests: int) -> Iterator[int]:
    """Step until all have ended; after each step, how many have."""
    running: list[_Request] = []
    random, begun = Random(1), 0
    while begun < requests or running:
        while len(running) < BATCH and begun < requests:
            running.append(_request(engine, pool, random, begun))
            begun += 1
        drawn = engine.step([request.next_item() for request in running])
        for request, sampled in zip(list(running), drawn, strict=True):
            if request.ends_with(sampled):
                running.remove(request)
                pool.give(request.blocks)
        yield begun - len(running)


def _time_of_loading(model: Path, dtype: str, threads: int, segment: Path) -> float:
    engine, seconds = _loaded(model, dtype, threads, segment)
    engine.close()
    return seconds


def _loaded(model: Path, dtype: str, threads: int, segment: Path) -> tuple[Engine, float]:
    begin = time.perf_counter()
    engine = Engine(
        EngineConfig(
            model_dir=model,
            dtype="bfloat16" if dtype == "int8" else dtype,
            quantization="int8" if dtype == "int8" else None,
            device="cpu",
            block_size=BLOCK,
            num_blocks=BLOCKS,
            segment=segment,
            threads=threads,
            max_model_len=PROMPT + ANSWER,
        )
    )
    return engine, time.perf_counter() - begin


def _request(engine: Engine, pool: PrefixPool, random: Random, number: int) -> _Request:
    prompt = [random.randrange(engine.model.vocab_size) for _ in range(random.randint(1, PROMPT))]
    blocks = pool.take(engine.layout.blocks_for(len(prompt) + ANSWER))
    sampler = engine.sampler(_DRAWN if number % 2 else _GREEDY, prompt, [])
    return _Request(number, prompt, len(prompt), blocks, sampler, random.randint(1, ANSWER))


def _memory() -> dict[str, int]:
    """``VmRSS``, ``RssAnon`` and the like of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[-1] == "kB"}


def _private(memory: dict[str, int]) -> int:
    return memory["RssAnon"] + memory["VmSwap"]
