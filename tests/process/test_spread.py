"""Instances whose stages are on several nodes: they answer as one rank does; the loss of a node costs no request.

The nodes are names for this machine, joined by TCP; what goes between them is encrypted. Where KV is handed over,
each node does that for its own stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsclient import AsyncClient
from dsctl import relays
from dswire.errors import EngineFailed
from dswire.keys import SYSTEM_PUBLIC, SYSTEM_SECRET, load_system, write_pair
from support.system import System, ask, running_system
from support.tiny_llama import engine_alone, odd_model, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float32, max_model_len: 256}}
nodes:
  - {{name: n0, devices: ["cpu:0", "cpu:1", "cpu:2"]}}
  - {{name: n1, devices: ["cpu:0", "cpu:1", "cpu:2"]}}
  - {{name: n2, devices: ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
ranks: {{port: {{port}}}}
kv: {{memory: 8MiB}}
security: {{curve: on, keys: {keys}}}
"""
COLOCATED = """
mode: colocated
decode: {pp: 2, place: [[n0/cpu:0, n1/cpu:0]], max_batch_tokens: 32}
"""
# blocks of two sizes, and stages of one rank and of two
DISAGGREGATED = """
prefill: {pp: 2, place: [[n0/cpu:0, n1/cpu:0]], max_batch_tokens: 32, kv: {block_size: 8}}
decode: {tp: 2, pp: 2, place: [[n0/cpu:1, n0/cpu:2, n1/cpu:1, n1/cpu:2]]}
"""
# a second pair, which the KV of the first cannot reach; prompts of both kinds, some in parts
PAIRS = """
mode: conditional
conditional: {threshold_tokens: 20}
relay: {overlap: on}
prefill: {pp: 2, place: [[n0/cpu:0, n1/cpu:0], [n2/cpu:0, n2/cpu:1]], max_batch_tokens: 32}
decode: {pp: 2, place: [[n0/cpu:1, n1/cpu:1], [n2/cpu:2, n2/cpu:3]]}
"""
# two stages on each node beside one of the same three and two layers
UNEQUAL = """
prefill: {pp: 4, place: [[n0/cpu:0, n0/cpu:1, n1/cpu:0, n1/cpu:1]], max_batch_tokens: 32}
decode: {pp: 2, place: [[n0/cpu:2, n1/cpu:2]]}
"""
#: and whether pools have mirrors, as those of GPUs do
MODES = {
    "colocated": (COLOCATED, "off"),
    "unequal": (UNEQUAL, "off"),
    "mirrored": (DISAGGREGATED, "on"),
    "pairs": (PAIRS, "off"),
}
TOKENS = 60
PROMPTS = [prompt_of(length) for length in (1, 17, 33, 60, 5, 90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model(tmp_path_factory.mktemp("model"), layers=5)


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    return engine_alone(model, PROMPTS, TOKENS)


@pytest.fixture(scope="module", params=MODES)
def system(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    keys = tmp_path_factory.mktemp("keys")
    write_pair(keys / SYSTEM_SECRET, keys / SYSTEM_PUBLIC)
    mode, mirror = MODES[request.param]
    text = TOPOLOGY.format(model=model, keys=keys) + mode
    with running_system(text, keys=load_system(keys), extra_env={"DS_KV_MIRROR": mirror}) as running:
        yield running


async def test_a_node_that_is_lost_costs_no_request(system: System, wanted: list[list[int]]) -> None:
    keys = load_system(system.topology.security.keys_dir)
    async with AsyncClient(system.address, keys=keys) as client:
        assert await asyncio.gather(*(ask(client, prompt, TOKENS) for prompt in PROMPTS)) == wanted
        for host in system.topology.hosts:
            stream = client.stream(prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            got = list((await anext(stream)).token_ids)
            asked = [asyncio.create_task(ask(client, prompt, TOKENS)) for prompt in PROMPTS]
            system.kill(host.name)
            assert await asyncio.to_thread(system.end_of, host.instance) == EngineFailed.exit_code
            await asyncio.to_thread(system.start, host.instance, host.name)
            async for piece in stream:
                got += piece.token_ids
            assert got == wanted[0]
            assert await asyncio.gather(*asked) == wanted
    await asyncio.to_thread(system.await_idle, 60.0)
    if system.topology.relays:
        for answer in await asyncio.to_thread(relays.ask, system.topology):
            assert answer.listing is not None
            assert [(path.transport, path.reason) for path in answer.listing.paths] == [("shm", "")]
