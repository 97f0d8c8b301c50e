"""config.json of several ages and families: read, or refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dsengine import families
from dsengine.architecture import Architecture
from dsengine.families import load_architecture
from dsengine.rope_settings import Rope
from dstopology.modelfacts import OWN_ARCHITECTURES
from dswire.errors import ModelNotFound, UnsupportedModel
from support.tiny_families import FAMILIES

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


def rope_of(arch: Architecture) -> Rope:
    """The one rope of a model whose layers are alike."""
    (rope,) = {layer.rope for layer in arch.plan}
    assert rope is not None
    return rope


def test_defaults_follow_transformers(tmp_path: Path) -> None:
    arch = load_architecture(write(tmp_path))
    assert (arch.kv_heads, arch.head_dim, arch.tied, arch.norm.eps) == (4, 16, False, 1e-6)
    rope = rope_of(arch)
    assert (rope.kind, rope.theta, rope.fraction) == ("default", 10000.0, 1.0)
    assert arch.eos_ids == {2}


def test_rope_of_transformers_5(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 32, **LLAMA3}
    read = rope_of(load_architecture(write(tmp_path, rope_parameters=rope)))
    assert (read.kind, read.theta, read.factor, read.original_len) == ("llama3", 500.0, 8.0, 32)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_of_transformers_4(tmp_path: Path, key: str) -> None:
    arch = load_architecture(write(tmp_path, rope_theta=700.0, rope_scaling={key: "linear", "factor": 2}))
    rope = rope_of(arch)
    assert (rope.kind, rope.theta, rope.factor, rope.original_len) == ("linear", 700.0, 2.0, 128)


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
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "unnamed"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantised weights .compression_config"),
        ({"num_key_value_heads": 3}, "3 KV heads for 4 heads"),
        ({"num_attention_heads": 5}, "hidden_size 64 over 5 heads"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "'proportional'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["chunked_attention"],
            },
            "'chunked_attention'",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
            "1 layer_types for 3 layers",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_architecture(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_mistral_has_a_window_unless_told_otherwise(
    tmp_path: Path, changes: dict[str, Any], window: int | None
) -> None:
    arch = load_architecture(write(tmp_path, architectures=["MistralForCausalLM"], **changes))
    assert [layer.rule.window for layer in arch.plan] == [window] * 3


def test_the_first_gptq_checkpoints_had_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"quantised weights \(quantize_config"):
        load_architecture(write(tmp_path))


#: what every published configuration of a family states; all else may be left to the family's defaults
STATED = {
    *("architectures", "eos_token_id", "vocab_size", "hidden_size", "intermediate_size", "ffn_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("n_embd", "n_head", "n_layer", "n_positions", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
}


@pytest.mark.parametrize("make_config", dict.fromkeys(made for made, _ in FAMILIES.values()))
def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path: Path, make_config: Any) -> None:
    whole = make_config().to_dict() | {
        "architectures": [AutoModelForCausalLM._model_mapping[make_config].__name__],
        "quantization_config": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole, default=str))
    expected = load_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if key in STATED}))
    assert load_architecture(tmp_path) == expected


def windows(tmp_path: Path, name: str, **changes: Any) -> list[int | None]:
    arch = load_architecture(write(tmp_path, architectures=[name], num_hidden_layers=7, **changes))
    return [layer.rule.window for layer in arch.plan]


def test_which_layers_slide_where_the_file_does_not_say(tmp_path: Path) -> None:
    qwen: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 5}
    assert windows(tmp_path, "Qwen2ForCausalLM", sliding_window=9) == [None] * 7
    assert windows(tmp_path, "Qwen3ForCausalLM", **qwen) == [None] * 5 + [4096] * 2
    assert windows(tmp_path, "Gemma2ForCausalLM", sliding_window=9) == [9, None, 9, None, 9, None, 9]
    assert windows(tmp_path, "Gemma3ForCausalLM", sliding_window=9) == [9] * 5 + [None, 9]


def test_smollm3_leaves_each_fourth_layer_without_positions(tmp_path: Path) -> None:
    arch = load_architecture(write(tmp_path, architectures=["SmolLM3ForCausalLM"], num_hidden_layers=7))
    assert [layer.rope is None for layer in arch.plan] == [False] * 3 + [True] + [False] * 3
    assert arch.tied


def test_gemma3_of_transformers_4_has_two_ropes(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    gemma: dict[str, Any] = {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 3}
    arch = load_architecture(
        write(tmp_path, **gemma, rope_theta=5e5, rope_local_base_freq=300.0, rope_scaling=scaling)
    )
    ropes = [layer.rope for layer in arch.plan]
    assert [rope and (rope.kind, rope.theta) for rope in ropes] == [("default", 300.0)] * 2 + [("linear", 5e5)]


def test_which_layers_have_experts(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    arch = load_architecture(write(tmp_path, **changes))
    assert [layer.sparse for layer in arch.plan] == [False, True, False, False, False, True]


def test_old_keys_of_gpt_neox(tmp_path: Path) -> None:
    arch = load_architecture(
        write(tmp_path, architectures=["GPTNeoXForCausalLM"], rotary_pct=0.5, rotary_emb_base=77)
    )
    rope = rope_of(arch)
    assert (rope.fraction, rope.theta, arch.parallel) == (0.5, 77.0, True)


def test_phi3_called_its_rope_su(tmp_path: Path) -> None:
    scaling = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    changes: dict[str, Any] = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    rope = rope_of(load_architecture(write(tmp_path, architectures=["Phi3ForCausalLM"], **changes)))
    assert (rope.kind, rope.original_len, rope.factor) == ("longrope", 16, 8.0)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(16)))


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
    code = "import sys, dsengine.families, dsengine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_topologies_know_which_architectures_are_computed_here() -> None:
    assert families.FAMILIES.keys() == OWN_ARCHITECTURES
