"""Angles against transformers' own, and the rotation's law."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dsengine.rope import RopeTable, inverse_frequencies
from dsengine.rope_settings import Rope
from dswire.errors import UnsupportedModel

DEFAULT = Rope("default", 10000.0, 1.0, 1.0, 1.0, 64)
CPU = torch.device("cpu")


def reference(parameters: dict[str, Any]) -> Any:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (DEFAULT, {"rope_type": "default", "rope_theta": 10000.0}),
        (Rope("linear", 100.0, 4.0, 1.0, 1.0, 64), {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
        (
            Rope("llama3", 500.0, 8.0, 1.0, 4.0, 64),
            {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            Rope("yarn", 500.0, 4.0, 1.0, 1.0, 64, attention_factor=0.1 * math.log(4) + 1),
            {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            Rope("yarn", 500.0, 4.0, 1.0, 1.0, 64, 1.0, 1.2, 20.0, 2.0, truncate=False),
            {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.2,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        ),
    ],
)
def test_rotation_equals_transformers(rope: Rope, parameters: dict[str, Any]) -> None:
    positions = torch.tensor([0, 1, 17, 63, 64, 200])
    x = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = reference(parameters)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    table = RopeTable(rope, 16, 256, torch.float32, CPU)
    torch.testing.assert_close(table.rotate(x, table.at(positions)), expected[0].transpose(0, 1))


def test_dynamic_is_default_within_the_trained_length() -> None:
    dynamic = Rope("dynamic", 10000.0, 2.0, 1.0, 1.0, 64)
    assert torch.equal(inverse_frequencies(dynamic, 16, 64), inverse_frequencies(DEFAULT, 16, 64))
    with pytest.raises(UnsupportedModel, match="beyond 64 positions") as caught:
        inverse_frequencies(dynamic, 16, 65)
    assert "64" in caught.value.remedy


def test_a_part_of_the_head_is_turned_and_the_rest_kept() -> None:
    whole = RopeTable(DEFAULT, 8, 64, torch.float32, CPU)
    part = RopeTable(replace(DEFAULT, fraction=0.5), 16, 64, torch.float32, CPU)
    x, at = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 63])
    turned = part.rotate(x, part.at(at))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8], whole.rotate(x[..., :8], whole.at(at)))


def test_longrope_takes_one_set_of_factors_for_all_positions() -> None:
    rope = Rope("longrope", 10000.0, 1.0, 1.0, 1.0, 64, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0))
    base = torch.tensor([1.0, 100.0])
    torch.testing.assert_close(inverse_frequencies(rope, 4, 64), 1 / (base * torch.tensor([1.0, 2.0])))
    torch.testing.assert_close(inverse_frequencies(rope, 4, 65), 1 / (base * torch.tensor([4.0, 8.0])))
    with pytest.raises(UnsupportedModel, match="2 factors for 8 frequencies"):
        inverse_frequencies(rope, 16, 64)


def test_a_product_depends_on_the_distance_alone() -> None:
    table = RopeTable(DEFAULT, 16, 64, torch.float32, CPU)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1))

    def product(at_q: int, at_k: int) -> float:
        turned = [table.rotate(x, table.at(torch.tensor([position]))) for x, position in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert product(20, 11) == pytest.approx(product(50, 41), abs=1e-4)
    assert product(20, 11) != pytest.approx(product(20, 12), abs=1e-3)
