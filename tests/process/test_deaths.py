"""A process is killed while requests are under way, and started again: each ends in time, well or by a typed error.

The requests are greedy, so an answer is either what an undisturbed system gives, token for token, or wrong. At the
moment of the kill some wait at the router and some at prefill, one is being prefilled, others are handed over or
decode. Afterwards nothing is held, and the system serves.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from dsclient import AsyncClient, Stream
from dsctl.relays import ask
from dsrouter.flow import INSTANCE_WAIT_S
from dstopology.resolved import Topology
from dswire.errors import Cancelled, DsError
from support.cuttable import CuttablePath
from support.system import System, running_system

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(180)]

TOPOLOGY = """
model: {path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 1024}
router: {frontend: "tcp://127.0.0.1:{port}"}
relay: {lease_s: 6, port: {port}, keep: KEEP}
prefill: {max_queue: 3, max_batch_tokens: 512}
decode: {kv: {blocks: 256}}
"""
#: room for the KV of all prompts, and of the shorter ones
KEEP = {"shm": "64MiB", "tcp": "4MiB"}

#: KV that no checksum proves waits for the relay's word, so that a frozen relay holds a hand-over
UNPROVED = TOPOLOGY.replace("lease_s: 6", "lease_s: 6, verify: false")

#: from the kill to the end of the last request, in seconds: start of a process on a loaded machine included
END_LIMIT_S = 90.0
IDLE_LIMIT_S = 60.0
TOKENS = 24
LENGTHS = (16, 200, 90, 400, 30, 500, 8, 300)
PROMPTS = tuple(
    tuple(1000 + (7 * number + place) % 900 for place in range(length)) for number, length in enumerate(LENGTHS)
)
#: what a client may be told of a death; none of these says that the answer was had
TOLD = {"worker_lost", "router_lost", "no_instance", "transfer_failed"}


@pytest.fixture(scope="module")
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    text = TOPOLOGY + "force_transport: tcp\n" if request.param == "tcp" else UNPROVED
    with running_system(text.replace("KEEP", KEEP[request.param])) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(system: System) -> list[tuple[int, ...]]:
    """The answers of an undisturbed system."""
    with system.client() as one:
        return [
            one.generate(prompt_ids=prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            .choices[0]
            .token_ids
            for prompt in PROMPTS
        ]


async def _ask(one: AsyncClient, prompt: Sequence[int]) -> tuple[int, ...] | str:
    """The tokens, or the code of the error."""
    try:
        made = await one.generate(prompt_ids=prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    except DsError as error:
        return error.code if error.message and error.remedy else f"an error that helps nobody: {error!r}"
    return made.choices[0].token_ids


async def _under_way(one: AsyncClient) -> list[asyncio.Task[tuple[int, ...] | str]]:
    """All requests, one of them decoding."""
    first = one.stream(prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for _ in range(2):
        await anext(first)

    async def rest() -> tuple[int, ...] | str:
        try:
            return (await first.result()).choices[0].token_ids
        except DsError as error:
            return error.code

    asks = [asyncio.create_task(rest())]
    asks += [asyncio.create_task(_ask(one, prompt)) for prompt in PROMPTS[1:]]
    async with asyncio.timeout(END_LIMIT_S):
        while sum((await one.status()).requests.values()) < 2:
            await asyncio.sleep(0)
    return asks


async def _kill_and_start(system: System, wanted: list[tuple[int, ...]], victim: str) -> None:
    async with AsyncClient(system.address) as one:
        asks = await _under_way(one)
        killed_at = time.monotonic()
        system.kill(victim)
        await asyncio.to_thread(system.start, victim)
        away_s = time.monotonic() - killed_at
        async with asyncio.timeout(END_LIMIT_S):
            ends = await asyncio.gather(*asks)
        for end, right in zip(ends, wanted, strict=True):
            assert end in TOLD or end == right
        if victim != "router-0" and away_s < INSTANCE_WAIT_S / 2:
            assert ends == wanted, "a worker that comes back soon costs time, and no request"
        await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)
        # what was lost was another's fault: it is answered now
        assert await asyncio.gather(*(_ask(one, prompt) for prompt in PROMPTS)) == wanted
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "relay-n0", "router-0"])
@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_every_request_ends_when_a_process_is_killed(
    system: System, wanted: list[tuple[int, ...]], victim: str
) -> None:
    await _kill_and_start(system, wanted, victim)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "relay-n0"])
@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_a_death_during_the_hand_over_costs_no_request(
    system: System, wanted: list[tuple[int, ...]], victim: str
) -> None:
    async with AsyncClient(system.address) as one:
        # a relay that stands still lets nobody past the hand-over
        system.freeze("relay-n0")
        ask = asyncio.create_task(_ask(one, PROMPTS[1]))
        await system.await_status(one.status, lambda worker: worker.name == "decode-0" and worker.blocks_held > 0)
        system.kill(victim)
        if victim != "relay-n0":
            system.thaw("relay-n0")
        await asyncio.to_thread(system.start, victim)
        async with asyncio.timeout(END_LIMIT_S):
            assert await ask == wanted[1]
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)


@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_an_answer_goes_on_from_kept_kv(system: System) -> None:
    sampling: dict[str, Any] = {
        "prompt_ids": PROMPTS[1],
        "temperature": 0.9,
        "seed": 7,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "ignore_eos": True,
    }
    system.await_connected()
    async with AsyncClient(system.address) as one:
        read = await _prompt_tokens(one)
        # far longer than it takes to be killed in its middle; ended by hand
        stream = one.stream(max_tokens=800, **sampling)
        made = list((await anext(stream)).token_ids)
        rest = asyncio.create_task(_collect(stream, made))
        async with asyncio.timeout(END_LIMIT_S):
            while not await asyncio.to_thread(_kept, system.topology):
                await asyncio.sleep(0.01)
        killed_at = time.monotonic()
        system.kill("decode-0")
        # not at prefill: it waits for a decode instance that pulls its KV
        await system.await_requests(one.status, {"placing": 1})
        await asyncio.to_thread(system.start, "decode-0")
        slow = time.monotonic() - killed_at >= INSTANCE_WAIT_S / 2
        before = len(made)
        async with asyncio.timeout(END_LIMIT_S):
            while not slow and len(made) < before + 12:
                await asyncio.sleep(0.01)
        stream.close()
        with pytest.raises(DsError if slow else Cancelled):
            await rest
        if slow:
            pytest.skip("no request waits for an instance for as long as this machine takes to start one")
        assert await _prompt_tokens(one) == read + len(PROMPTS[1])
        undisturbed = await one.generate(max_tokens=len(made), **sampling)
        assert undisturbed.choices[0].token_ids == tuple(made)
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)


async def _collect(stream: Stream, made: list[int]) -> None:
    while outputs := await stream.take():
        made += [token for output in outputs for token in output.token_ids]


def _kept(topology: Topology) -> bool:
    """Whether a relay keeps a copy that nobody reads."""
    listings = [answer.listing for answer in ask(topology)]
    return any(one.state == "kept" for listing in listings if listing is not None for one in listing.handles)


async def _prompt_tokens(one: AsyncClient) -> int:
    """Tokens of the prompts that prefill has read, as it tells from now on."""
    began = time.monotonic()
    async with asyncio.timeout(IDLE_LIMIT_S):
        while True:
            (prefill,) = (worker for worker in (await one.status()).workers if worker.role == "prefill")
            if prefill.report_age_s < time.monotonic() - began:
                return prefill.prompt_tokens
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_a_client_whose_connection_is_cut_gets_the_rest(
    system: System, wanted: list[tuple[int, ...]]
) -> None:
    name = f"cut-{uuid.uuid4().hex}"
    async with CuttablePath(int(system.address.rsplit(":", 1)[1])) as path, AsyncClient(path.address) as one:
        stream = one.stream(
            prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=TOKENS, ignore_eos=True, request_id=name
        )
        await anext(stream)
        path.cut()
        assert (await stream.result()).choices[0].token_ids == wanted[0]
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "relay-n0"])
@pytest.mark.parametrize("system", ["tcp"], indirect=True)
async def test_every_request_ends_when_a_process_is_killed_and_kv_goes_over_tcp(
    system: System, wanted: list[tuple[int, ...]], victim: str
) -> None:
    await _kill_and_start(system, wanted, victim)
