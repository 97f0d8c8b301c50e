"""What a running system needs beyond the engine's own time, for the simulator to know: measured, not assumed.

A few requests one at a time, a few at once, and each phase beside the other, on a system that does nothing else:

- messages: what of TTFT and of prefill is neither in the ledger's stages nor in a step;
- copies and checksums: how hand-off and offer grow with the prompt;
- steps: their time in the system less the engine's own, for one sequence and for eight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

from dsbench.load import TOKENS
from dsclient import AsyncClient, Completion
from dskv.layout import KvLayout
from dssim.records import Record
from dssim.times import StepTimes
from dswire.errors import Failed

#: the whole is asked so many times, so that a slow moment does not count
TURNS = 3
#: (prompt tokens, requests of them), one at a time
SINGLES = ((64, 2), (640, 2))
#: sequences of the batch, and prompt tokens of each
TOGETHER, SHORT = 8, 32
#: output tokens of a request that is to be watched while it decodes
OUTPUT = 32
#: of those together: the first is read by itself, begins before the others, and is to be there when they end
OUTPUTS = (4 * OUTPUT, *((OUTPUT,) * (TOGETHER - 1)))
#: limit of the whole, in seconds
LIMIT_S = 180.0


@dataclass(frozen=True, slots=True)
class Seen:
    """Answers of a probe."""

    #: instances that the batches were spread over
    decoding: int
    #: by prompt tokens
    alone: dict[int, list[Completion]]
    #: by turn
    together: list[list[Completion]]


@dataclass(frozen=True, slots=True)
class Constants:
    """What the probe found."""

    #: fields of :class:`dssim.times.FlatTransfer`
    transfer: dict[str, float]
    #: as ``overhead`` of a profile's fit
    overhead: dict[str, dict[str, float]]


async def probe(client: AsyncClient, tell: Callable[[str], None], *, decoding: int) -> Seen:
    """Ask. ``decoding``: instances that decode, which all get a whole batch. Raises what requests raise."""
    asking = _Asking(client, Random(0))
    async with asyncio.timeout(LIMIT_S):
        await asking.ask(SHORT, OUTPUT)
        seen = Seen(decoding, {length: [] for length, _ in SINGLES}, [])
        tell(f"{TURNS} times some requests one at a time, and {TOGETHER * decoding} at once")
        for _ in range(TURNS):
            for length, count in SINGLES:
                seen.alone[length] += [await asking.ask(length, OUTPUT) for _ in range(count)]
            batch = [(SHORT, output) for output in OUTPUTS for _ in range(decoding)]
            seen.together.append(await asking.many(batch))
    return seen


@dataclass
class _Asking:
    client: AsyncClient
    random: Random

    async def ask(self, prompt: int, output: int) -> Completion:
        ids = self.random.choices(TOKENS, k=prompt)
        return await self.client.generate(prompt_ids=ids, max_tokens=output, ignore_eos=True, seed=1)

    async def many(self, lengths: Sequence[tuple[int, int]]) -> list[Completion]:
        return list(await asyncio.gather(*(self.ask(prompt, output) for prompt, output in lengths)))


def constants(seen: Seen, times: StepTimes, layout: KvLayout) -> Constants:
    """What the answers tell, with ``times`` of the engine alone. Raises :class:`Failed` for too few answers."""
    if not seen.together or any(not answers for answers in seen.alone.values()):
        raise Failed("the probe got no answers", remedy="see the logs of the system")
    short, long = (seen.alone[length] for length, _ in SINGLES)
    transfer = messages(short)
    nbytes = [layout.blocks_for(length) * layout.block_nbytes for length, _ in SINGLES]
    for name, stage in (("seal_bytes_per_s", "placement_s"), ("copy_bytes_per_s", "transfer_s")):
        ways = [median(getattr(one.ledger, stage) for one in answers) for answers in (short, long)]
        # a slope that is lost in the noise of messages is as good as none
        transfer[name] = (nbytes[1] - nbytes[0]) / (ways[1] - ways[0]) if ways[1] - ways[0] > 1e-5 else 0.0
    base_ms, sequence_ms = _decode_overhead(short, seen, times)
    read_ms = median((one.ledger.prefill_s - times.prefill_s([one.usage.prompt_tokens])) * 1e3 for one in short)
    overhead = {
        "prefill": {"base_ms": read_ms},
        "decode": {"base_ms": base_ms, "per_sequence_ms": sequence_ms},
    }
    return Constants(transfer, overhead)


def messages(answers: Iterable[Completion | Record]) -> dict[str, float]:
    """What a message takes within a node, and one from or to a client; nothing where there are no answers."""
    known = [(one.ledger, one.ttft_s) for one in answers if one.ledger is not None]
    if not known:
        return {}
    return {
        "local_message_s": max(median(ledger.prefill_wire_s for ledger, _ in known) / 2, 0.0),
        "network_message_s": max(median(ttft_s - ledger.ttft_s for ledger, ttft_s in known) / 2, 0.0),
    }


def _decode_overhead(short: Sequence[Completion], seen: Seen, times: StepTimes) -> tuple[float, float]:
    """Milliseconds of a step, and of each sequence in it, beyond the engine's."""
    one_ms = median(step_s(one) - times.decode_s([_context(one)]) for one in short) * 1e3
    whole_ms = median(_batch_overhead_s(answers, seen.decoding, times) for answers in seen.together) * 1e3
    each_ms = (whole_ms - one_ms) / (TOGETHER - 1)
    return one_ms - each_ms, each_ms


def _batch_overhead_s(answers: Sequence[Completion], decoding: int, times: StepTimes) -> float:
    """A step of a whole batch beyond the engine's.

    Of all but the first on each instance, which saw the whole batch from their first step to their last.
    """
    contexts = [_context(one) for one in answers[::decoding]]
    return median(map(step_s, answers[decoding:])) - times.decode_s(contexts)


def step_s(one: Completion) -> float:
    """Time of one step of a request's decoding, from its second token on."""
    return one.ledger.decode_s / (one.usage.completion_tokens - 2)


def _context(one: Completion) -> int:
    """Tokens of a sequence half way through its answer."""
    return one.usage.prompt_tokens + one.usage.completion_tokens // 2
