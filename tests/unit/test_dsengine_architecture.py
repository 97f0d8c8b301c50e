"""config.json of several ages and families: read, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsengine.architecture import load_architecture
from dswire.errors import ModelNotFound, UnsupportedModel

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(BASE | changes))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_defaults_follow_transformers(tmp_path: Path) -> None:
    arch = load_architecture(write(tmp_path))
    assert (arch.kv_heads, arch.head_dim, arch.tied, arch.norm_eps) == (4, 16, False, 1e-6)
    assert (arch.rope.kind, arch.rope.theta) == ("default", 10000.0)
    assert arch.eos_ids == {2}


def test_rope_of_transformers_5(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 32, **LLAMA3}
    arch = load_architecture(write(tmp_path, rope_parameters=rope))
    assert (arch.rope.kind, arch.rope.theta, arch.rope.factor) == ("llama3", 500.0, 8.0)
    assert arch.rope.original_len == 32


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_of_transformers_4(tmp_path: Path, key: str) -> None:
    arch = load_architecture(write(tmp_path, rope_theta=700.0, rope_scaling={key: "linear", "factor": 2}))
    assert (arch.rope.kind, arch.rope.theta, arch.rope.factor) == ("linear", 700.0, 2.0)
    assert arch.rope.original_len == 128


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [5, 6]}, {5, 6}), ({"eos_token_id": 7}, {7}), ({"top_k": 3}, {2})],
)
def test_the_generation_configuration_says_how_an_answer_ends(
    tmp_path: Path, generation: dict[str, Any], expected: set[int]
) -> None:
    assert load_architecture(write(tmp_path, generation)).eos_ids == expected


def test_a_model_without_end_token(tmp_path: Path) -> None:
    assert load_architecture(write(tmp_path, eos_token_id=None)).eos_ids == frozenset()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": []}, "unnamed"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window 4096"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"num_key_value_heads": 3}, "3 KV heads for 4 heads"),
        ({"num_attention_heads": 5}, "hidden_size 64 over 5 heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_architecture(write(tmp_path, **changes))


def test_mistral_without_window_is_llama(tmp_path: Path) -> None:
    assert load_architecture(write(tmp_path, architectures=["MistralForCausalLM"])).name == "MistralForCausalLM"


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_architecture(tmp_path)


@pytest.mark.parametrize("text", ['{"architectures": ["Llama', '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load_architecture(tmp_path)


def test_a_damaged_generation_configuration(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelNotFound, match=r"generation_config\.json"):
        load_architecture(tmp_path)


def test_no_torch_is_loaded() -> None:
    code = "import sys, dsengine.architecture, dsengine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
