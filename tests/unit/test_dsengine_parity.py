"""Every family against transformers: logits, greedy tokens, resumption, batches, block borders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsengine.runner import Engine
from support.tiny_families import FAMILIES, make_family
from support.tiny_llama import GREEDY, Reference, Run, engine_config, generate, prompt_of
from support.whole_logits import logits_of

#: around the borders of blocks of 16 and windows of 20, and beyond
LENGTHS = (1, 15, 16, 17, 34, 70)
COUNT = 20


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return Engine(engine_config(model_dir, max_model_len=128))


@pytest.mark.parametrize("prefilled", [50, 15, 16, 17])
def test_logits(engine: Engine, reference: Reference, prefilled: int) -> None:
    tokens = prompt_of(50)
    got, want = logits_of(engine, tokens, prefilled), reference.logits(tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert float(want.std()) > 0.1  # otherwise everything would be near everything


def test_greedy_tokens(engine: Engine, model_dir: Path, reference: Reference) -> None:
    prompts = [prompt_of(length) for length in LENGTHS]
    if "longrope" in (model_dir / "config.json").read_text():
        prompts = prompts[-2:]  # shorter ones turn with other factors in transformers
    together = generate(engine, prompts, COUNT)
    assert together == [reference.generate(prompt, COUNT) for prompt in prompts]
    assert together == [generate(engine, [prompt], COUNT)[0] for prompt in prompts]
    run = Run(engine)
    run.prefill(prompts, [GREEDY] * len(prompts), [tokens[:9] for tokens in together])
    for _ in range(COUNT - 10):
        run.decode(range(len(prompts)))
    assert [run.tokens(row) for row in range(len(prompts))] == [tokens[9:] for tokens in together]
