"""KV by communicators of torch.distributed, Gloo here: several owners and readers at once, ranks, and a death.

The pools have mirrors, as those of GPUs have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsclient import AsyncClient
from dsctl import relays
from support.system import System, ask, running_system
from support.tiny_llama import engine_alone, make_model, prompt_of
from support.tokenizers_here import byte_level, save

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float32, max_model_len: 256}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
kv: {{memory: 8MiB}}
prefill: {{replicas: 2}}
decode: {{replicas: 2, tp: 2, kv: {{block_size: 8}}}}
relay: {{port: {{port}}}}
force_transport: gloo
"""
TOKENS = 30
PROMPTS = [prompt_of(length) for length in (1, 17, 33, 60, 5, 90, 48, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(tmp_path_factory.mktemp("model"), byte_level())
    return make_model(path, vocab_size=300, max_position_embeddings=256)


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    return engine_alone(model, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def system(model: Path) -> Iterator[System]:
    with running_system(TOPOLOGY.format(model=model), extra_env={"DS_KV_MIRROR": "on"}) as running:
        yield running


async def _ask_all(client: AsyncClient) -> list[list[int]]:
    return await asyncio.gather(*(ask(client, prompt, TOKENS) for prompt in PROMPTS))


async def test_all_owners_have_been_tried(system: System) -> None:
    async with asyncio.timeout(60.0):
        while True:
            (answer,) = await asyncio.to_thread(relays.ask, system.topology)
            assert answer.listing is not None
            paths = {path.source: path for path in answer.listing.paths}
            assert not any(path.reason for path in paths.values())
            if len(paths) == 2 and all(path.bytes_per_s for path in paths.values()):
                break
    assert set(paths) == {"prefill-0", "prefill-1"}
    assert {path.transport for path in paths.values()} == {"gloo"}


async def test_all_owners_and_readers_at_once(system: System, wanted: list[list[int]]) -> None:
    async with AsyncClient(system.address) as client:
        for _ in range(3):
            assert await _ask_all(client) == wanted


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
async def test_a_death_costs_no_request(system: System, wanted: list[list[int]], name: str) -> None:
    async with AsyncClient(system.address) as client:
        asked = asyncio.create_task(_ask_all(client))
        system.kill(name)
        assert await asked == wanted
        await asyncio.to_thread(system.start, name)
        assert await _ask_all(client) == wanted
    await asyncio.to_thread(system.await_idle, 60.0)
