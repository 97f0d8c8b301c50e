"""Instances whose stages are on several nodes: they answer as one rank does; the loss of a node costs no request.

The nodes are names for this machine, joined by TCP; what goes between them is encrypted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsclient import AsyncClient
from dswire.errors import EngineFailed
from dswire.keys import SYSTEM_PUBLIC, SYSTEM_SECRET, load_system, write_pair
from support.system import System, ask, running_system
from support.tiny_llama import engine_alone, odd_model, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float32, max_model_len: 256}}
mode: colocated
nodes:
  - {{name: n0, devices: ["cpu:0"]}}
  - {{name: n1, devices: ["cpu:0"]}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
decode: {{pp: 2, place: [[n0/cpu:0, n1/cpu:0]], max_batch_tokens: 32}}
ranks: {{port: {{port}}}}
kv: {{memory: 8MiB}}
security: {{curve: on, keys: {keys}}}
"""
TOKENS = 60
PROMPTS = [prompt_of(length) for length in (1, 17, 33, 60, 5, 90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    return engine_alone(model, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def system(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    keys = tmp_path_factory.mktemp("keys")
    write_pair(keys / SYSTEM_SECRET, keys / SYSTEM_PUBLIC)
    with running_system(TOPOLOGY.format(model=model, keys=keys), keys=load_system(keys)) as running:
        yield running


async def test_a_node_that_is_lost_costs_no_request(system: System, wanted: list[list[int]]) -> None:
    keys = load_system(system.topology.security.keys_dir)
    async with AsyncClient(system.address, keys=keys) as client:
        assert await asyncio.gather(*(ask(client, prompt, TOKENS) for prompt in PROMPTS)) == wanted
        stream = client.stream(prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        got = list((await anext(stream)).token_ids)
        asked = [asyncio.create_task(ask(client, prompt, TOKENS)) for prompt in PROMPTS]
        system.kill("decode-0-n0")
        assert await asyncio.to_thread(system.end_of, "decode-0") == EngineFailed.exit_code
        await asyncio.to_thread(system.start, "decode-0", "decode-0-n0")
        async for piece in stream:
            got += piece.token_ids
        assert got == wanted[0]
        assert await asyncio.gather(*asked) == wanted
