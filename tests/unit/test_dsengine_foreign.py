"""Models that transformers' modules run on the paged KV: equal to transformers, or refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dsengine.config_json import ConfigFile
from dsengine.foreign_shape import load_foreign_shape
from dsengine.runner import Engine
from dswire.errors import UnsupportedModel
from support.tiny_families import save_random
from support.tiny_llama import (
    GREEDY,
    VOCAB,
    Reference,
    Run,
    edit_config,
    engine_config,
    generate,
    make_model,
    prompt_of,
)
from support.whole_logits import logits_of

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: of many kinds: norms behind the branches, multipliers, parallel branches, windows, experts
MODELS: dict[str, dict[str, Any]] = {
    "Olmo2": {},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "Cohere": {"logit_scale": 0.5},
    "Phi": {"partial_rotary_factor": 0.5},
    "Starcoder2": {"sliding_window": 20},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def make(path: Path, name: str, **changes: Any) -> Path:
    return save_random(path, getattr(transformers, f"{name}Config")(**SETTINGS | changes))


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_transformers(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, name, **MODELS[name])
    with caplog.at_level(logging.INFO, "dsengine"):
        engine = Engine(engine_config(tmp_path, max_model_len=128))
    assert f"{name}ForCausalLM is served by transformers' modules" in caplog.text
    reference = Reference(tmp_path)
    tokens = prompt_of(50)
    torch.testing.assert_close(logits_of(engine, tokens, 12, 21), reference.logits(tokens), rtol=0, atol=1e-4)
    prompts = [prompt_of(length) for length in (1, 15, 16, 17, 40)]
    together = generate(engine, prompts, 12)
    assert together == [reference.generate(prompt, 12) for prompt in prompts]
    assert together == [generate(engine, [prompt], 12)[0] for prompt in prompts]
    run = Run(engine)
    run.prefill(prompts, [GREEDY] * 5, [made[:11] for made in together])
    assert [run.tokens(row) for row in range(5)] == [made[11:] for made in together]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_probe(tmp_path: Path, dtype: str) -> None:
    make(tmp_path, "Olmo2", initializer_range=0.1)
    tokens = prompt_of(40)
    got = logits_of(Engine(engine_config(tmp_path, dtype=dtype)), tokens, 33)
    want = Reference(tmp_path).logits(tokens)
    assert float((got - want).norm() / want.norm()) < 0.05


def test_a_lean_family_with_an_unknown_feature_goes_this_way(tmp_path: Path) -> None:
    make_model(tmp_path, hidden_act="relu2")
    tokens = prompt_of(30)
    got = logits_of(Engine(engine_config(tmp_path)), tokens, 17)
    torch.testing.assert_close(got, Reference(tmp_path).logits(tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "s_aux"),
        ("Bloom", {"n_layer": 2, "n_head": 6}, "its attention cannot be replaced"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of conv"),
        ("DeepseekV3", {"num_key_value_heads": 6, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}, "keys of"),
    ],
)
def test_attention_that_is_not_covered_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    make(tmp_path, name, **changes)
    with pytest.raises(UnsupportedModel, match=words):
        Engine(engine_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}, "transformers does not know it"),
        ({"architectures": ["Olmo2ForSequenceClassification"]}, "no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights"),
        ({"num_key_value_heads": 4}, "do not divide"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "depends on the length"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(make(tmp_path, "Olmo2"), **changes)
    with pytest.raises(UnsupportedModel, match=words):
        Engine(engine_config(tmp_path))


def test_missing_and_surplus_tensors(tmp_path: Path) -> None:
    path = make(tmp_path, "Olmo2") / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors have no place, such as model\.extra\.weight"):
        Engine(engine_config(tmp_path))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors are missing, such as .*up_proj"):
        Engine(engine_config(tmp_path))


def test_a_window_that_attention_is_not_told_of(tmp_path: Path) -> None:
    edit_config(make(tmp_path, "Olmo2"), sliding_window=30)
    with pytest.raises(UnsupportedModel, match="window of 30") as caught:
        Engine(engine_config(tmp_path, max_model_len=31))
    assert "at most 30" in caught.value.remedy
    Engine(engine_config(tmp_path, max_model_len=30))


def test_no_int8(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="Olmo2ForCausalLM has no int8 weights"):
        Engine(engine_config(make(tmp_path, "Olmo2"), quantization="int8"))


def test_the_shape_is_known_before_the_weights(tmp_path: Path) -> None:
    make(tmp_path, "Starcoder2", sliding_window=20)
    (tmp_path / "model.safetensors").unlink()
    shape = load_foreign_shape(tmp_path)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.window) == (2, 2, 8, 20)
    assert shape.eos_ids == ConfigFile.load(tmp_path).eos_ids() == {2}
