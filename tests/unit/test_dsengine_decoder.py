"""Logits of every variant against transformers, prefilled whole and decoded token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsengine.attention import PagedAttention
from dsengine.decoder import Decoder
from dsengine.families import load_architecture
from dsengine.parallel import Alone
from dsengine.parts import Parts
from dsengine.pool import KvPool
from dsengine.rope import RopeTable
from dsengine.span import Span
from dsengine.weights import Checkpoint
from dskv.layout import KvLayout
from dswire.errors import UnsupportedModel
from support.tiny_llama import Reference, make_model, prompt_of

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one head each": {"num_key_value_heads": 6},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head size": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}},
}


def load(model_dir: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, KvPool]:
    arch = load_architecture(model_dir)
    name = str(dtype).removeprefix("torch.")
    layout = KvLayout(arch.layers, arch.kv_heads, arch.head_dim, 16, name)
    parts = Parts(arch, Checkpoint(model_dir, dtype, CPU))
    return Decoder(parts, lambda rope: RopeTable(rope, arch.head_dim, 128, dtype, CPU), Alone()), KvPool(
        layout, 16, CPU
    )


def prefill_logits(llama: Decoder, pool: KvPool, tokens: list[int]) -> torch.Tensor:
    attention = PagedAttention(pool, [Span(tokens, 0, range(16))])
    with torch.inference_mode():
        logits = llama.run(torch.tensor(tokens), torch.arange(len(tokens)), attention, None)
    assert logits is not None
    return logits


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(tmp_path: Path, variant: dict[str, Any]) -> None:
    llama, pool = load(make_model(tmp_path, **variant))
    tokens = prompt_of(100)
    want = Reference(tmp_path).logits(tokens)
    torch.testing.assert_close(prefill_logits(llama, pool, tokens), want, rtol=0, atol=1e-4)
    for position in range(15, 50):
        attention = PagedAttention(pool, [Span(tokens[position : position + 1], position, range(16))])
        with torch.inference_mode():
            got = llama.run(torch.tensor([tokens[position]]), torch.tensor([position]), attention, None)
        assert got is not None
        torch.testing.assert_close(got[0], want[position], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(tmp_path: Path, dtype: torch.dtype) -> None:
    make_model(tmp_path, initializer_range=0.1)
    llama, pool = load(tmp_path, dtype)
    tokens = prompt_of(40)
    got, want = prefill_logits(llama, pool, tokens), Reference(tmp_path).logits(tokens)
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def edit_tensors(model_dir: Path, *, drop: str = "", **add: torch.Tensor) -> None:
    path = model_dir / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file({**kept, **{name.replace("__", "."): tensor for name, tensor in add.items()}}, path)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    edit_tensors(make_model(tmp_path), drop=name)
    with pytest.raises(UnsupportedModel, match=f"tensor {name} is missing"):
        load(tmp_path)


def test_a_surplus_tensor_is_named(tmp_path: Path) -> None:
    edit_tensors(make_model(tmp_path), model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    with pytest.raises(UnsupportedModel, match=r"such as model\.layers\.0\.self_attn\.q_norm\.weight"):
        load(tmp_path)


def test_what_old_checkpoints_carry_along_is_no_surplus(tmp_path: Path) -> None:
    make_model(tmp_path, tie_word_embeddings=True)
    edit_tensors(
        tmp_path,
        lm_head__weight=torch.zeros(211, 48),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    llama, pool = load(tmp_path)
    assert bool(prefill_logits(llama, pool, [5]).any())
