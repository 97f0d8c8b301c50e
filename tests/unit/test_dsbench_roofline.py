"""The least a step can cost, against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsbench.machine import Machine
from dsbench.points import Measured, Point
from dsbench.roofline import Kernels, Work, kernels, matrix_elements
from dsengine.architecture import Architecture
from dsengine.families import load_architecture

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
}
#: Q, K, V; out; gate, up, down
LAYER = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
WEIGHTS = 3 * LAYER + 800


@pytest.fixture
def arch(tmp_path: Path) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return load_architecture(tmp_path)


def test_matrix_elements(arch: Architecture) -> None:
    assert matrix_elements(arch, 7) == (3 * LAYER, 3 * LAYER)


def test_a_decode_step_reads_all_weights_once_and_each_cache(arch: Architecture) -> None:
    got = kernels(arch, Point("decode", "bfloat16", 1, 5, 40)).whole
    assert got.nbytes == 2 * (WEIGHTS + 5 * 40 * 3 * 2 * 2 * 2)
    narrow = kernels(arch, Point("decode", "int8", 1, 5, 40)).whole
    # a byte and a sixteenth, for scales, instead of two; the cache stays as it is
    assert (narrow.nbytes, narrow.flops) == (got.nbytes - WEIGHTS * 15 / 16, got.flops)
    assert got.flops == 2 * 5 * WEIGHTS + 4 * 5 * 40 * 3 * 4 * 2


def test_a_prefill_makes_one_row_of_logits_and_half_a_square_of_scores(arch: Architecture) -> None:
    got = kernels(arch, Point("prefill", "float32", 1, 1, 10)).whole
    assert got.nbytes == 4 * (WEIGHTS + 10 * 3 * 2 * 2 * 2)
    assert got.flops == 2 * 10 * 3 * LAYER + 2 * 800 + 2 * 100 * 3 * 4 * 2


def test_the_slower_of_memory_and_arithmetic_counts() -> None:
    assert Work(nbytes=100, flops=100).seconds(Machine(bytes_per_s=10, flops_per_s=50)) == 10
    assert Work(nbytes=100, flops=1000).seconds(Machine(bytes_per_s=10, flops_per_s=50)) == 20


def test_kernels_that_take_turns_have_their_limits_added_up() -> None:
    machine = Machine(bytes_per_s=10, flops_per_s=50)
    both = Kernels(layers=Work(10, 500), attention=Work(100, 5), head=Work(20, 50))
    assert both.seconds_in_turn(machine) == 10 + 10 + 2
    assert both.whole.seconds(machine) == 13


def test_of_experts_those_are_read_that_tokens_go_to(tmp_path: Path) -> None:
    def work(**changes: object) -> Work:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
        return kernels(load_architecture(tmp_path), Point("decode", "float32", 1, batch, 1)).layers

    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    inner, layers, hidden = 16, 3, 8
    # 4 (1 - 1/2^n) experts are met by n tokens, of which each multiplies with two; and all by the router
    for batch, met in ((1, 2.0), (2, 3.0), (60, 4.0)):
        dense, mixture = work(), work(**mixtral)
        assert mixture.nbytes - dense.nbytes == pytest.approx(4 * layers * hidden * (4 + 3 * inner * (met - 1)))
        assert mixture.flops - dense.flops == 2 * batch * layers * hidden * (4 + 3 * inner)


@pytest.mark.parametrize(("phase", "tokens"), [("decode", 4.0), ("prefill", 60.0)])
def test_a_figure_as_json(phase: str, tokens: float) -> None:
    point = Point("decode" if phase == "decode" else "prefill", "float32", 2, 2, 30)
    assert Measured("distserve", point, 0.5, Machine(2e9, 3e11), 0.8).as_json() == {
        "system": "distserve",
        "phase": phase,
        "dtype": "float32",
        "threads": 2,
        "batch": 2,
        "context": 30,
        "seconds": 0.5,
        "tokens_per_s": tokens,
        "roofline_fraction": 0.8,
        "in_turn_fraction": None,
        "outside_fraction": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "machine_bytes_per_s": 2e9,
        "machine_flops_per_s": 3e11,
        "reason": None,
    }
