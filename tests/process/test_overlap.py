"""KV of long prompts in parts: the same answers, most of the transfer hidden, and deaths on either side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsclient import AsyncClient, Completion, Sampling
from support.system import System, running_system
from support.tiny_llama import engine_alone, make_model, prompt_of
from support.tokenizers_here import byte_level, save

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float32, max_model_len: 512}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
kv: {{memory: 16MiB, prefix_cache: false}}
prefill: {{replicas: 2, max_batch_tokens: 64}}
decode: {{replicas: 2, tp: 2, kv: {{block_size: 8}}}}
relay: {{port: {{port}}, overlap: "on"}}
"""
TOKENS = 20
PROMPTS = [prompt_of(length) for length in (400, 65, 128, 63, 301, 257)]
#: those that are more than one step's work for the prefill
IN_PARTS = {at for at, prompt in enumerate(PROMPTS) if len(prompt) > 64}
#: on a busy host a decode process may wake so late that all parts are there: that hides nothing, and is no fault
ROUNDS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(tmp_path_factory.mktemp("model"), byte_level())
    return make_model(path, vocab_size=300, max_position_embeddings=512)


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[tuple[int, ...]]:
    return [tuple(made) for made in engine_alone(model, PROMPTS, TOKENS, max_model_len=512, num_blocks=128)]


@pytest.fixture(scope="module", params=["shm", "tcp"])
def system(request: pytest.FixtureRequest, model: Path) -> Iterator[System]:
    with running_system(TOPOLOGY.format(model=model) + f"force_transport: {request.param}\n") as running:
        yield running


async def _ask_all(client: AsyncClient) -> list[Completion]:
    how = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return await asyncio.gather(*(client.generate(prompt_ids=prompt, sampling=how) for prompt in PROMPTS))


async def test_answers_are_the_same_and_transfers_are_hidden(system: System, wanted: list[tuple[int, ...]]) -> None:
    async with AsyncClient(system.address) as client:
        hidden: set[int] = set()
        for _ in range(ROUNDS):
            made = await _ask_all(client)
            assert [one.choices[0].token_ids for one in made] == wanted
            hidden.update(at for at, one in enumerate(made) if one.ledger.transfer_hidden_s > 0)
            if len(hidden) == len(IN_PARTS):
                break
        assert hidden == IN_PARTS


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
async def test_a_death_costs_no_request(system: System, wanted: list[tuple[int, ...]], name: str) -> None:
    async with AsyncClient(system.address) as client:
        asked = asyncio.create_task(_ask_all(client))
        await asyncio.sleep(0)
        system.kill(name)
        assert [one.choices[0].token_ids for one in await asked] == wanted
        await asyncio.to_thread(system.start, name)
    await asyncio.to_thread(system.await_idle, 60.0)
