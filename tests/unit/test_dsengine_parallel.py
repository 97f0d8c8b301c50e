"""A model shared out between ranks computes what it computes in one piece, and refuses what cannot be shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsengine.native.decoder import NativeDecoder
from dsengine.parallel import Part
from dsengine.runner import Engine, StepItem
from dsengine.span import Span
from dswire.errors import UnsupportedModel
from support.rank_threads import ThreadedEngine
from support.tiny_families import make_family
from support.tiny_llama import GREEDY, engine_config, generate, make_model, prompt_of
from support.whole_logits import logits_of

#: twelve heads, an inner dimension and a vocabulary (211) that three and four do not divide
TWELVE = {"num_attention_heads": 12, "hidden_size": 48, "intermediate_size": 82, "num_hidden_layers": 5}
PROMPTS = [prompt_of(length) for length in (1, 16, 37)]
COUNT = 5
#: each way to store matrices, to add biases, and to place norms and experts; those that the kernels take
KINDS = ("gemma3", "gpt2", "opt with norms behind", "gpt-neox", "phi3", "qwen2", "qwen2-moe", "mixtral")
ON_KERNELS = ("gemma3", "gpt2", "gpt-neox", "phi3", "qwen2", "qwen2-moe", "mixtral")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of KV heads."""
    made = {}
    for kv_heads in (12, 2):
        path = tmp_path_factory.mktemp("model")
        settings = TWELVE | {"num_key_value_heads": kv_heads, "attention_bias": True, "mlp_bias": True}
        made[kv_heads] = make_model(path, **settings)
    return made


@pytest.fixture(scope="module")
def in_one_piece(models: dict[int, Path]) -> dict[int, list[list[int]]]:
    return {heads: generate(Engine(engine_config(path)), PROMPTS, COUNT) for heads, path in models.items()}


@pytest.mark.parametrize(
    ("kv_heads", "tp", "pp"), [*((12, tp, pp) for tp in (1, 2, 3, 4) for pp in (1, 2, 3)), (2, 2, 1), (2, 4, 2)]
)
def test_greedy_tokens_do_not_depend_on_the_shares(
    models: dict[int, Path], in_one_piece: dict[int, list[list[int]]], kv_heads: int, tp: int, pp: int
) -> None:
    engine = ThreadedEngine(models[kv_heads], tp, pp, kernels=False)
    assert generate(engine, PROMPTS, COUNT) == in_one_piece[kv_heads]
    engine.close()


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_stages_on_compiled_kernels_give_the_same_bits(tmp_path: Path, name: str) -> None:
    path, tokens = make_family(tmp_path, name), prompt_of(40)
    settings = {"max_model_len": 128, "dtype": "bfloat16"}
    staged = ThreadedEngine(path, 1, 3, **settings)
    assert isinstance(staged._model, NativeDecoder)
    assert torch.equal(
        logits_of(staged, tokens, 33), logits_of(Engine(engine_config(path, **settings)), tokens, 33)
    )
    staged.close()


@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, False) for name in KINDS), *((name, True) for name in ON_KERNELS)]
)
def test_families_can_be_shared_out(tmp_path: Path, name: str, kernels: bool) -> None:
    whole = Engine(engine_config(make_family(tmp_path, name), max_model_len=128))
    shared = ThreadedEngine(tmp_path, 2, 2, max_model_len=128, kernels=kernels)
    assert isinstance(shared._model, NativeDecoder) == kernels
    tokens = prompt_of(40)
    for first, end in ((0, 33), (33, 40)):
        spans = [Span(tokens[first:end], first, [5, 2, 9])]
        rows = range(end - first)
        got, want = shared.forward(spans, rows), whole.forward(spans, rows)
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    shared.close()


def test_steps_of_several_sequences_are_under_way_at_once(
    models: dict[int, Path], in_one_piece: dict[int, list[list[int]]]
) -> None:
    engine = ThreadedEngine(models[12], 2, 2)
    begun = [
        engine.launch(
            [StepItem(prompt, 0, [3 * row, 3 * row + 1, 3 * row + 2], engine.sampler(GREEDY, prompt, ()))]
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    for end, tokens in zip(begun, in_one_piece[12], strict=True):
        (sampled,) = end()
        assert sampled is not None
        assert sampled.token == tokens[0]
    engine.close()


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (Part(tp=5), "12 attention heads cannot be shared by tp 5"),
        (Part(tp=3), "2 KV heads cannot be shared by tp 3"),
        (Part(pp=6), "5 layers cannot make 6 stages"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(models: dict[int, Path], part: Part, told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        Engine(engine_config(models[2]), part)


def test_a_surplus_tensor_is_found_by_the_rank_that_it_concerns(tmp_path: Path) -> None:
    path = make_model(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"model.layers.1.surplus": torch.ones(1)}, path)
    Engine(engine_config(tmp_path), Part(pp=2, rank=0))
    with pytest.raises(UnsupportedModel, match=r"such as model\.layers\.1\.surplus"):
        Engine(engine_config(tmp_path), Part(pp=2, rank=1))
