"""The engine on a GPU: what transformers computes on the CPU, alone and shared out between ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsengine import mirror
from dsengine.pool import KvPool
from dsengine.ranks import RankedEngine
from dsengine.runner import Engine
from dskv.layout import KvLayout
from support import handover
from support.rank_threads import ThreadedEngine
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
    engine = RankedEngine("gpu", [dataclasses.replace(here, device=f"cuda:{rank}") for rank in range(2)], tp, pp)
    assert generate(engine, PROMPTS, COUNT) == want
    engine.close()
