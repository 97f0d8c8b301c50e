"""Instances of several ranks: they answer as one rank does, and a rank that dies takes its instance down cleanly.

Prefill runs in two stages, decode on two shares of every layer: KV that is handed over is shared out anew.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from dsclient import AsyncClient
from dsengine import rank_process
from dsengine.ranks import RankedEngine
from dsengine.rendezvous import Rendezvous
from dskv.segment import Segment
from dswire.errors import DsError, DuplicateName, EngineFailed
from dswire.messages.client import Sampling
from support.system import System, ask, running_system
from support.tiny_llama import Run, engine_alone, engine_config, generate, odd_model, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]

TOPOLOGY = """
model: {{path: {model}, dtype: float32, max_model_len: 256}}
router: {{frontend: "tcp://127.0.0.1:{{port}}"}}
kv: {{memory: 8MiB}}
prefill: {{pp: 2}}
decode: {{tp: 2, kv: {{block_size: 8}}}}
"""
TOKENS = 60
PROMPTS = [prompt_of(length) for length in (1, 17, 33, 60, 5, 90)]
#: for a process to be gone, in seconds
END_LIMIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    return engine_alone(model, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def system(model: Path) -> Iterator[System]:
    with running_system(TOPOLOGY.format(model=model)) as running:
        yield running


def _other_ranks(system: System, name: str) -> list[int]:
    threads = Path(f"/proc/{system.pid(name)}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


async def _gone(pid: int) -> None:
    """Wait until a process, not necessarily a child, is no more."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(descriptor, ended.set_result, None)
    await asyncio.wait_for(ended, END_LIMIT_S)
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


def _pools(system: System, name: str) -> list[str]:
    return sorted(path.name for path in system.topology.shm_dir.glob(f"ds-{system.topology.digest}-{name}.*"))


async def test_a_rank_that_dies_costs_no_request(system: System, wanted: list[list[int]]) -> None:
    async with AsyncClient(system.address) as client:
        assert await asyncio.gather(*(ask(client, prompt, TOKENS) for prompt in PROMPTS)) == wanted
        stream = client.stream(prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        got = list((await anext(stream)).token_ids)
        asked = [asyncio.create_task(ask(client, prompt, TOKENS)) for prompt in PROMPTS]
        (other,) = _other_ranks(system, "decode-0")
        os.kill(other, signal.SIGKILL)
        await _gone(system.pid("decode-0"))
        assert system.end_of("decode-0") == EngineFailed.exit_code
        assert "killed by SIGKILL" in system.log("decode-0").read_text()
        assert _pools(system, "decode-0") == []
        await asyncio.to_thread(system.start, "decode-0")
        async for piece in stream:
            got += piece.token_ids
        assert got == wanted[0]
        assert await asyncio.gather(*asked) == wanted


async def test_no_rank_outlives_its_instance(system: System) -> None:
    (other,) = _other_ranks(system, "prefill-0")
    assert len(_pools(system, "prefill-0")) == 2
    assert list(system.topology.run_dir.glob("*.ranks.*")) == []  # they have met
    system.kill("prefill-0")
    await _gone(other)
    (left,) = _pools(system, "prefill-0")
    assert left.endswith("-prefill-0.1.kv")  # its own, which the next one of its name would replace
    (system.topology.shm_dir / left).unlink()


def test_a_rank_that_cannot_load_tells_why(model: Path, tmp_path: Path) -> None:
    configs = [engine_config(model, segment=tmp_path / f"{rank}.kv") for rank in range(2)]
    taken = Segment.create(tmp_path / "0.kv", 1, 1)
    with pytest.raises(DuplicateName, match="a live process of that name uses it"):
        RankedEngine("prefill-0", configs, 1, 2, Rendezvous(tmp_path, "prefill-0"))
    assert [path.name for path in tmp_path.iterdir()] == ["0.kv"]
    taken.close()


def _moved(engine: RankedEngine, directory: Path, count: int) -> list[int]:
    """What a sequence makes whose KV is moved to other blocks, by way of what others see of all ranks' pools."""
    run = Run(engine)
    run.prefill(PROMPTS[3:4], [Sampling(temperature=0.0)])
    blocks, others = run.blocks[0], range(1, 1 + len(run.blocks[0]))
    assert not set(blocks) & set(others)
    engine.mirror(blocks, "out")
    for rank in range(2):
        segment = Segment.open(directory / f"{rank}.kv", 64, engine.pool.layout.block_nbytes, writable=True)
        for block, other in zip(blocks, others, strict=True):
            segment.copy_from(segment, [block], [other])
        segment.close()
    engine.mirror(others, "in")
    run.blocks[0] = list(others)
    for _ in range(count - 1):
        run.decode([0])
    return run.tokens(0)


def test_a_rank_that_is_frozen_is_noticed_and_ended(
    model: Path, wanted: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [engine_config(model, segment=tmp_path / f"{rank}.kv", mirror=True) for rank in range(2)]
    engine = RankedEngine("decode-0", configs, 2, 1, Rendezvous(tmp_path, "decode-0"))
    lost: SimpleQueue[DsError] = SimpleQueue()
    engine.watch(lost.put)
    assert _moved(engine, tmp_path, 6) == wanted[3][:6]
    (other,) = (child.pid for child in engine._children.values())
    os.kill(other, signal.SIGSTOP)
    # from now on, nothing can be taken for silence that is none
    monkeypatch.setattr(rank_process, "SILENCE_S", 1.0)
    frozen = "rank 1 of decode-0 is frozen: it gave no sign of life for"
    with ThreadPoolExecutor(1) as beside:
        copying = beside.submit(engine.mirror, (1, 2), "in")
        with pytest.raises(EngineFailed, match=frozen):
            generate(engine, PROMPTS[:1], 2)
        with pytest.raises(EngineFailed, match=frozen):
            copying.result(END_LIMIT_S)
    assert "is frozen" in lost.get(timeout=END_LIMIT_S).message
    engine.close()
