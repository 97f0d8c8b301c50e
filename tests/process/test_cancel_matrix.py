"""Cancel, disconnect and deadline at every stage of a request, on real processes: it ends, and nothing is held.

A process is frozen (SIGSTOP) to hold a request at a stage that otherwise passes in a millisecond; its workers'
lease is longer than any of the freezes here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from dswire.messages import client
from support.system import System, running_system
from support.wire_client import WireClient

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(120)]

#: a client silent for this long is gone
LEASE_S = 2.0
DEADLINE_S = 2.5
#: no handle outlives its lease and a second
KV_LEASE_S = 6.0
#: ... on a machine that is itself slow
IDLE_LIMIT_S = KV_LEASE_S + 1.0 + 25.0

TOPOLOGY = f"""
model: {{path: smollm2-135m-instruct, dtype: bfloat16, max_model_len: 8192}}
router: {{frontend: "tcp://127.0.0.1:{{port}}", client_lease_s: {LEASE_S}, worker_lease_s: 15}}
relay: {{lease_s: {KV_LEASE_S}, port: {{port}}}}
prefill: {{max_queue: 1}}
decode: {{kv: {{blocks: 520}}}}
"""

STAGES = ("queued at router", "queued at prefill", "prefilling", "waiting for decode", "transferring", "decoding")
ENDINGS = ("cancel", "disconnect", "deadline")


@pytest.fixture(scope="module")
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    # on one host, KV that no checksum proves waits for the relay's word, so that a frozen relay holds a hand-over
    unproved = TOPOLOGY.replace("relay: {", "relay: {verify: false, ")
    with running_system(TOPOLOGY + "force_transport: tcp\n" if request.param == "tcp" else unproved) as running:
        # a relay that is frozen before the instances have greeted it would hold requests at an earlier stage
        running.await_connected()
        yield running


@asynccontextmanager
async def frozen(system: System, *names: str) -> AsyncIterator[None]:
    """Hold processes still."""
    for name in names:
        system.freeze(name)
    try:
        yield
    finally:
        for name in names:
            system.thaw(name)


def _submit(prompt_tokens: int, max_tokens: int, deadline_s: float | None = None) -> client.Submit:
    sampling = client.Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ids = tuple(1000 + number % 100 for number in range(prompt_tokens))
    return client.Submit(uuid.uuid4().hex, prompt_ids=ids, sampling=sampling, deadline_s=deadline_s)


class Case:
    """One request on its way to a stage, beside a second client that looks at the system and keeps its lease."""

    def __init__(self, system: System, ending: str) -> None:
        self.system = system
        self.ending = ending
        self.subject = WireClient(system.address)
        self.observer = WireClient(system.address)
        self.request_id = ""

    async def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        """The request that is to end."""
        deadline_s = DEADLINE_S if self.ending == "deadline" else None
        submit = _submit(prompt_tokens, max_tokens, deadline_s)
        self.request_id = submit.request_id
        self.subject.send(submit)
        await self.subject.expect(client.Accepted)

    async def status(self) -> client.StatusReport:
        """What the router knows."""
        self.observer.send(client.StatusQuery())
        return await self.observer.expect(client.StatusReport)

    async def end(self) -> None:
        """End the request in the way of this case, and see that it ends so."""
        before = Counter((await self.status()).ended)
        match self.ending:
            case "cancel":
                self.subject.send(client.Cancel(self.request_id))
                failed = await self.subject.expect(client.Failed)
                assert failed.error.code == "cancelled"
            case "disconnect":
                self.subject.drop()
                async with asyncio.timeout(LEASE_S + 30.0):
                    while Counter((await self.status()).ended)["cancelled"] == before["cancelled"]:
                        await asyncio.sleep(0.1)
            case "deadline":
                failed = await self.subject.expect(client.Failed)
                assert failed.error.code == "deadline_exceeded"

    def close(self) -> None:
        """Leave in good order."""
        for one in (self.subject, self.observer):
            one.drop()


async def _bring_to(case: Case, stage: str) -> None:
    """With the right processes frozen, bring the request to its stage."""
    system = case.system
    match stage:
        case "queued at router":
            # max_queue is 1: the first one fills the prefill instance
            case.observer.send(_submit(8, 1))
            await case.observer.expect(client.Accepted)
            await case.submit(8, 4)
            assert (await case.status()).requests == {"prefilling": 1, "queued": 1}
        case "queued at prefill":
            await case.submit(8, 4)
            assert (await case.status()).requests == {"prefilling": 1}
        case "prefilling":
            # nothing is queued there, so its step begins when the request arrives, and takes a second or more;
            # with so long an answer it cannot be through before a lease or a deadline is
            await case.submit(2000, 4000)
            await asyncio.sleep(0.2)
            assert (await case.status()).requests == {"prefilling": 1}
        case "waiting for decode":
            await case.submit(64, 4)
            await case.subject.expect(client.Output)
            await system.await_requests(case.status, {"decoding": 1})
        case "transferring":
            await case.submit(64, 4)
            await case.subject.expect(client.Output)
            await system.await_status(
                case.status, lambda worker: worker.name == "decode-0" and worker.blocks_held > 0
            )
        case "decoding":
            await case.submit(64, 4000)
            for _ in range(3):
                await case.subject.expect(client.Output)


FREEZES = {
    "queued at router": ("prefill-0",),
    "queued at prefill": ("prefill-0",),
    "waiting for decode": ("decode-0",),
    "transferring": ("relay-n0",),
}


async def _end_at(system: System, stage: str, ending: str) -> None:
    case = Case(system, ending)
    try:
        await case.subject.hello()
        await case.observer.hello()
        async with frozen(system, *FREEZES.get(stage, ())):
            await _bring_to(case, stage)
            await case.end()
    finally:
        case.close()
    await asyncio.to_thread(system.await_idle, IDLE_LIMIT_S + LEASE_S)


# one system serves all cases of a transport: its parameter is one of its own, by which pytest groups the tests


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("system", ["shm"], indirect=True)
async def test_nothing_is_held_after(system: System, stage: str, ending: str) -> None:
    await _end_at(system, stage, ending)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("system", ["tcp"], indirect=True)
async def test_nothing_is_held_after_a_transfer_by_tcp(system: System, ending: str) -> None:
    """Before and after the transfer its transport makes no difference."""
    await _end_at(system, "transferring", ending)
