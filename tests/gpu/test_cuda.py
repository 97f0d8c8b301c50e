"""The engine on a GPU: what transformers computes on the CPU, alone and shared out between ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsengine.ranks import RankedEngine
from dsengine.runner import Engine
from support.rank_threads import ThreadedEngine
from support.tiny_families import FAMILIES, make_family
from support.tiny_llama import Reference, engine_config, generate, make_model, prompt_of
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


@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_ranks_of_a_gpu_each(tmp_path: Path, tp: int, pp: int) -> None:
    here = engine_config(make_model(tmp_path))
    want = generate(Engine(here), PROMPTS, COUNT)
    engine = RankedEngine("gpu", [dataclasses.replace(here, device=f"cuda:{rank}") for rank in range(2)], tp, pp)
    assert generate(engine, PROMPTS, COUNT) == want
    engine.close()
