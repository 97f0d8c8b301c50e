"""An instance's engine before it serves, and what begins while it does."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import Future
from pathlib import Path
from threading import get_ident
from typing import NoReturn

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from dsengine.gpu_copies import GpuCopies
from dsengine.instance import WARM_UP_TOKENS, RunningInstance, _by_gpu
from dsengine.runner import Engine
from dskv.handle import KvKey
from dskv.layout import KvLayout
from dsprefill.actor import build
from dsprefill.events import Seal
from dssched.steps import ForgetSequence, Run, RunStep, StartSequence
from dstopology.resolved import Topology
from dswire.errors import OutOfMemory, StartFailed, TransferFailed
from dswire.messages.client import Sampling
from support import handover
from support.gpu_memory import SharedMemory
from support.tiny_llama import engine_config, generate, make_model, prompt_of
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


@pytest.mark.parametrize("mirrored", [("prefill-0", "decode-0"), ("prefill-0",), ("decode-0",)])
async def test_kv_of_a_pool_that_cannot_be_mapped_is_handed_over(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, mirrored: tuple[str, ...]
) -> None:
    topology, both = topology_of(tmp_path, model_dir, 12, 128), []
    for name in ("prefill-0", "decode-0"):
        monkeypatch.setenv("DS_KV_MIRROR", "on" if name in mirrored else "off")
        both.append(await handover.load(topology, name))
        assert both[-1].mirrored == (name in mirrored)
    here = Engine(engine_config(model_dir))
    for prompt in (prompt_of(70), prompt_of(5)):
        assert [await handover.generate(both[0], both[1], prompt, 9)] == generate(here, [prompt], 9)
    for running in both:
        running.close()


async def test_kv_goes_from_gpu_to_gpu(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, both = SharedMemory(), []

    def copies(blocks: Tensor, layout: KvLayout) -> GpuCopies:
        return GpuCopies(blocks, layout, memory.share, memory.opened)

    monkeypatch.setattr("dsengine.instance._by_gpu", lambda _: True)
    monkeypatch.setattr("dsengine.instance.GpuCopies", copies)
    topology = topology_of(tmp_path, model_dir, 12, 128)
    for name in ("prefill-0", "decode-0"):
        both.append(await handover.load(topology, name))
        assert not topology.instance(name).segment.exists()
    here = Engine(engine_config(model_dir))
    for prompt in (prompt_of(70), prompt_of(5)):
        assert [await handover.generate(both[0], both[1], prompt, 9)] == generate(here, [prompt], 9)
    assert memory.openings == 1
    for running in both:
        running.close()


def test_gpus_that_do_not_reach_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = "model: m\nnodes: [{name: g, devices: [cuda:0, cuda:1]}]\n"
    desk = Desk(tmp_path)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    assert _by_gpu(desk.load(gpus))
    assert not _by_gpu(desk.load(gpus + "force_transport: shm\n"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one < other)
    with capture_logs() as logs:
        assert not _by_gpu(desk.load(gpus))
    assert [log["why"] for log in logs] == ["cuda:1 cannot read the memory of cuda:0"]
    with pytest.raises(StartFailed, match="cuda:1 cannot read the memory of cuda:0"):
        _by_gpu(desk.load(gpus + "force_transport: cuda_ipc\n"))


async def test_what_finds_no_room_in_a_mirror_can_be_shown_later(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_KV_MIRROR", "on")
    running = await handover.load(topology_of(tmp_path, model_dir, 8, 128), "prefill-0")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TransferFailed, match="no room for 2 slots"):
            await handover.offered(running, prompt_of(20))
    await handover.offered(running, prompt_of(20))
    running.close()


async def test_checksums_begin_in_the_thread_of_steps(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsprefill.actor.SMALL_NBYTES", 0)
    phases: list[str] = []
    actor = await build(topology_of(tmp_path, model_dir, 8, 128), "prefill-0", phases.append)
    try:
        asked: list[int] = []
        seal_soon = actor._running.seal_soon

        def noted(key: KvKey, blocks: tuple[int, ...], *, summed: bool) -> Future[int]:
            asked.append(get_ident())
            return seal_soon(key, blocks, summed=summed)

        monkeypatch.setattr(actor._running, "seal_soon", noted)
        keys = [KvKey(f"r{number}/0", 0) for number in range(3)]
        for key in keys:
            actor.perform(StartSequence(key, (1, 2, 3), (), Sampling(seed=0)))
        runs = [Run(key, (1, 2, 3), 0, (2 * at, 2 * at + 1), at < 2) for at, key in enumerate(keys)]
        await actor._step(RunStep(1, tuple(runs), 1))
        # of what is read: not here, nor of the prompt of which more is to come
        assert len(asked) == 2
        assert get_ident() not in asked
        assert set(actor._sealing) == set(keys[:2])
        sealed = [await actor._seal(Seal(run.key, run.blocks)) for run in (runs[0], runs[2])]
        assert [one.checksum for one in sealed] == [actor._running.pools.checksum(runs[at].blocks) for at in (0, 2)]
        # what is dropped instead leaves nothing behind
        actor.perform(ForgetSequence(keys[1]))
        assert not actor._sealing
    finally:
        actor.closed()
        for route in actor.routes:
            route.socket.close()
