"""The engine on a GPU: what transformers computes on the CPU, alone and shared out between ranks."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import msgspec
import pytest
import torch

from dsclient import Client
from dsengine import mirror
from dsengine.architecture import AttentionRule
from dsengine.gpu.steps import prove
from dsengine.gpu_copies import GpuCopies
from dsengine.pool import KvPool
from dsengine.ranks import RankedEngine
from dsengine.rendezvous import Rendezvous
from dsengine.runner import Engine
from dskv.layout import KvLayout
from dskv.shards import GpuMemory
from dswire.errors import KvCorrupt
from dswire.messages.kv import PoolInfo
from support import handover
from support.handles import LAYOUT, make_handle
from support.rank_threads import ThreadedEngine
from support.system import running_system
from support.tiny_families import FAMILIES, make_family
from support.tiny_llama import Reference, engine_config, generate, make_model, prompt_of
from support.tokenizers_here import byte_level, save
from support.topologies import Desk
from support.whole_logits import logits_of

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="there is no GPU here")]

PROMPTS = [prompt_of(length) for length in (1, 17, 40)]
COUNT = 12


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 as it is written."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(tmp_path: Path, name: str) -> None:
    tokens = prompt_of(50)
    engine = Engine(engine_config(make_family(tmp_path, name), device="cuda:0", max_model_len=128))
    got = logits_of(engine, tokens, 7, 9, 2, 30).cpu()
    torch.testing.assert_close(got, Reference(tmp_path).logits(tokens), rtol=0, atol=1e-3)
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(tmp_path: Path, dtype: str) -> None:
    make_model(tmp_path, initializer_range=0.1)
    tokens = prompt_of(50)
    got = logits_of(Engine(engine_config(tmp_path, device="cuda:0", dtype=dtype)), tokens, 40).cpu()
    want = Reference(tmp_path).logits(tokens)
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("rule", [AttentionRule(), AttentionRule(window=130), AttentionRule(0.2, 7, 20.0)], ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (5, 5, 24, 8), (32, 8, 128, 16), (8, 1, 256, 32)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_in_place(dtype: str, shape: tuple[int, int, int, int], rule: AttentionRule) -> None:
    heads, kv_heads, head_dim, block_size = shape
    layout = KvLayout(layers=2, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    with torch.inference_mode():
        prove(KvPool(layout, 4, torch.device("cuda:0")), heads, rule)


@pytest.mark.parametrize("family", ["llama with yarn", "gemma2", "gpt2", "mixtral"])
def test_recorded_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str) -> None:
    config = engine_config(make_family(tmp_path, family))
    with caplog.at_level(logging.INFO, "dsengine"):
        engine = Engine(dataclasses.replace(config, device="cuda:0", max_batch=5))
    assert ("sequences recorded in" in caplog.text) == (family != "mixtral")
    assert "slower" not in caplog.text
    for prompts in (PROMPTS, PROMPTS[1:], PROMPTS[2:]):
        assert generate(engine, prompts, COUNT) == generate(Engine(config), prompts, COUNT)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_that_share_a_gpu(tmp_path: Path, tp: int, pp: int) -> None:
    make_model(tmp_path)
    want = generate(Engine(engine_config(tmp_path)), PROMPTS, COUNT)
    engine = ThreadedEngine(tmp_path, tp, pp, device="cuda:0")
    assert generate(engine, PROMPTS, COUNT) == want
    engine.close()


def test_blocks_go_between_a_pool_and_its_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KvLayout(layers=3, kv_heads=2, head_dim=4, block_size=5, dtype="bfloat16")
    monkeypatch.setattr(mirror, "_BOUNCE_NBYTES", 2 * layout.block_nbytes)
    pool = KvPool(layout, 9, torch.device("cuda:0"), tmp_path / "pool", mirrored=True)
    assert pool.mirror is not None
    assert pool.segment is not None
    seen = torch.frombuffer(pool.segment.buffer, dtype=torch.bfloat16).view(9, -1)
    written = torch.randn(seen.shape).bfloat16()
    pool._blocks.copy_(written)
    pool.mirror.copy((7, 0, 3, 8, 2), "out")
    for block in range(9):
        assert torch.equal(seen[block], written[block] if block in (7, 0, 3, 8, 2) else torch.zeros_like(seen[0]))
    seen[:] = 1
    pool.mirror.copy((4, 6, 1), "in")
    for block in range(9):
        assert torch.equal(pool._blocks[block].cpu(), seen[0] if block in (4, 6, 1) else written[block])
    pool.close()


@pytest.mark.parametrize(("owner", "reader"), [("cuda:0", "cuda:0"), ("cuda:0", "cpu:0"), ("cpu:0", "cuda:0")])
async def test_kv_is_handed_over(tmp_path: Path, owner: str, reader: str) -> None:
    model = make_model(save(tmp_path / "model", byte_level()), vocab_size=300)
    here = Engine(engine_config(model))
    topology = Desk(tmp_path).load(
        f"model: {{path: {model}, dtype: float32, max_model_len: 128}}\nkv: {{blocks: 12}}\n"
    )
    first = await handover.load(topology, "prefill-0", owner)
    second = await handover.load(topology, "decode-0", reader)
    for prompt in PROMPTS:
        assert [await handover.generate(first, second, prompt, COUNT)] == generate(here, [prompt], COUNT)
    for running in (first, second):
        running.close()


@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_of_a_gpu_each(tmp_path: Path, tp: int, pp: int) -> None:
    here = engine_config(make_model(tmp_path))
    want = generate(Engine(here), PROMPTS, COUNT)
    configs = [dataclasses.replace(here, device=f"cuda:{rank}") for rank in range(2)]
    engine = RankedEngine("gpu", configs, tp, pp, Rendezvous(tmp_path, "gpu"))
    assert generate(engine, PROMPTS, COUNT) == want
    engine.close()


OWNER = """
import sys, msgspec, torch
from dsengine.gpu.steps import prove
from dsengine.gpu_copies import GpuCopies
from support.handles import LAYOUT
numbers = torch.randn(16, LAYOUT.block_nbytes // 2, generator=torch.Generator().manual_seed(5))
blocks = numbers.to(torch.float16).to(sys.argv[1])
copies = GpuCopies(blocks, LAYOUT)
sys.stdout.buffer.write(msgspec.json.encode((copies.shared, copies.seal(range(1, 6), summed=True))) + b"\\n")
sys.stdout.buffer.flush()
sys.stdin.read()
"""


@pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(min(GPUS, 2))])
def test_another_process_opens_a_pool_and_sees_what_changes(device: str) -> None:
    command = [sys.executable, "-c", OWNER, device]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env=os.environ | path) as owner:
        assert owner.stdout is not None
        memory, checksum = msgspec.json.decode(owner.stdout.readline(), type=tuple[GpuMemory, int])
        shards = (msgspec.structs.replace(make_handle().shards[0], gpu=memory),)
        handle = make_handle(blocks=range(1, 6), segment_blocks=16, checksum=checksum)
        handle = msgspec.structs.replace(handle, shards=shards)
        mine = torch.zeros(16, LAYOUT.block_nbytes // 2, dtype=torch.float16, device="cuda:0")
        copies = GpuCopies(mine, LAYOUT)
        assert copies.read_rate("prefill-0", PoolInfo(LAYOUT, shards, 16)) > 0.0
        copies.fetch(handle, range(9, 14), summed=True)
        numbers = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5)).to(torch.float16)
        assert torch.equal(mine[9:14].cpu(), numbers[1:6])
        with pytest.raises(KvCorrupt):
            copies.fetch(msgspec.structs.replace(handle, blocks=(1, 2, 3, 5, 4)), range(9, 14), summed=True)
        copies.close()
        owner.communicate()


TOPOLOGY = """
model: {path: smollm2-135m-instruct, dtype: float32, max_model_len: 1024}
nodes: [{name: g, devices: [cuda:0, cuda:1]}]
router: {node: g, frontend: "tcp://127.0.0.1:{port}"}
kv: {memory: 1GiB}
"""


@pytest.mark.process
@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs here")
def test_a_whole_system_hands_kv_from_gpu_to_gpu() -> None:
    made = []
    for text in (TOPOLOGY, TOPOLOGY + "force_transport: shm\n"):
        with running_system(text) as system, Client(system.address) as client:
            answers = (client.generate(prompt_ids=one, temperature=0.0, max_tokens=COUNT) for one in PROMPTS)
            made.append([one.choices[0].token_ids for one in answers])
    assert made[0] == made[1]
