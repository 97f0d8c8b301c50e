"""Every family against transformers: logits, greedy tokens, resumption, batches, block borders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsengine.runner import Engine
from support.tiny_families import FAMILIES, make_family
from support.tiny_llama import GREEDY, Reference, Run, engine_config, generate, prompt_of
from support.whole_logits import logits_of

#: around the borders of blocks of 16 and windows of 20, and beyond
LENGTHS = (1, 15, 16, 17, 34, 70)
COUNT = 16


#: one each of norm, position, MLP and residual
KINDS = ("gemma2", "gemma3", "gpt2", "opt with norms behind", "gpt-neox", "phi3 with longrope", "qwen2-moe")


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="module")
def greedy(model_dir: Path, reference: Reference) -> dict[int, list[int]]:
    """transformers' continuation of the prompt of each length."""
    # Prompts within the trained length turn with other factors in transformers.
    lengths = LENGTHS[-2:] if "longrope" in (model_dir / "config.json").read_text() else LENGTHS
    return {length: reference.generate(prompt_of(length), COUNT) for length in lengths}


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def engine(model_dir: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(engine_config(model_dir, max_model_len=128, kernels=request.param))
    yield made
    made.close()


@pytest.mark.parametrize("chunks", [(50,), (15,), (7, 9, 2, 30)], ids=["whole", "token by token", "chunks"])
def test_logits(engine: Engine, reference: Reference, chunks: tuple[int, ...]) -> None:
    tokens = prompt_of(50)
    got, want = logits_of(engine, tokens, *chunks), reference.logits(tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert float(want.std()) > 0.1  # otherwise everything would be near everything


def test_greedy_tokens(engine: Engine, greedy: dict[int, list[int]]) -> None:
    prompts = [prompt_of(length) for length in greedy]
    together = generate(engine, prompts, COUNT)
    assert together == list(greedy.values())
    assert together == [generate(engine, [prompt], COUNT)[0] for prompt in prompts]
    run = Run(engine)
    run.prefill(prompts, [GREEDY] * len(prompts), [tokens[:9] for tokens in together])
    for _ in range(COUNT - 10):
        run.decode(range(len(prompts)))
    assert [run.tokens(row) for row in range(len(prompts))] == [tokens[9:] for tokens in together]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_stays_near(tmp_path: Path, name: str, dtype: str) -> None:
    make_family(tmp_path, name, **{"init_std" if "opt" in name else "initializer_range": 0.1})
    tokens = prompt_of(50)
    got = logits_of(Engine(engine_config(tmp_path, dtype=dtype, max_model_len=128)), tokens, 40)
    want = Reference(tmp_path).logits(tokens)
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 0.05


def test_short_engines_turn_by_the_short_factors(tmp_path: Path) -> None:
    make_family(tmp_path, "phi3 with longrope")
    tokens = prompt_of(32)
    got = logits_of(Engine(engine_config(tmp_path, max_model_len=32)), tokens, 20)
    torch.testing.assert_close(got, Reference(tmp_path).logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix", "extra"),
    [
        ("gpt2", "transformer.", {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.ones(1)}),
        ("opt", "model.", {"lm_head.weight": torch.ones(1)}),
        ("gpt-neox", "", {"gpt_neox.layers.2.attention.rotary_emb.inv_freq": torch.ones(2)}),
    ],
)
def test_checkpoints_as_they_were_published(
    tmp_path: Path, name: str, prefix: str, extra: dict[str, torch.Tensor]
) -> None:
    make_family(tmp_path, name)
    tokens = prompt_of(20)
    want = Reference(tmp_path).logits(tokens)
    path = tmp_path / "model.safetensors"
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()}
    save_file(tensors | extra, path)
    got = logits_of(Engine(engine_config(tmp_path)), tokens, 15)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
