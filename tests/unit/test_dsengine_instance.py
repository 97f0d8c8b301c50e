"""An instance's engine before it serves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import pytest

from dsengine.instance import WARM_UP_TOKENS, RunningInstance
from dsengine.runner import Engine
from dstopology.resolved import Topology
from dswire.errors import OutOfMemory
from support.tiny_llama import make_model
from support.tokenizers_here import byte_level
from support.topologies import Desk


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("model"))
    byte_level().save(str(made / "tokenizer.json"))
    return made


def topology_of(directory: Path, model_dir: Path, blocks: int, max_len: int) -> Topology:
    text = f"model: {{path: {model_dir}, dtype: float32, max_model_len: {max_len}}}\nkv: {{blocks: {blocks}}}\n"
    return Desk(directory).load(text)


async def load(topology: Topology, phases: list[str]) -> RunningInstance:
    return await RunningInstance.load(topology, topology.instance("prefill-0"), phases.append)


@pytest.mark.parametrize(("blocks", "max_len", "written"), [(8, 128, WARM_UP_TOKENS + 1), (1, 16, 16)])
def test_an_instance_has_taken_steps_before_it_serves(
    tmp_path: Path, model_dir: Path, blocks: int, max_len: int, written: int
) -> None:
    phases: list[str] = []
    running = asyncio.run(load(topology_of(tmp_path, model_dir, blocks, max_len), phases))
    try:
        layout, pool = running.engine.layout, running.engine.pool
        # each token has keys and values in every layer and head
        rows = pool._blocks.view(-1, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        tokens = rows.abs().sum(dim=(1, 2, 3, 5)).flatten()
        assert (tokens > 0).tolist() == [at < written for at in range(blocks * layout.block_size)]
        assert phases == ["loading model", "warming up"]
    finally:
        running.close()


def test_what_the_first_step_meets_ends_the_start(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = topology_of(tmp_path, model_dir, 8, 128)

    def full(*_: object) -> NoReturn:
        assert topology.instance("prefill-0").segment.exists()
        raise OutOfMemory("no room for a step")

    monkeypatch.setattr(Engine, "forward", full)
    with pytest.raises(OutOfMemory, match="no room for a step"):
        asyncio.run(load(topology, []))
    assert not topology.instance("prefill-0").segment.exists()
