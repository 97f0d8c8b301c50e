"""Quantised products against exact ones, and a quantised model against its own float weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from dsengine import int8
from dsengine.int8 import BLOCK_ROWS, GROUP, Int8Linear, peaks_of, quantise, widened
from dsengine.linear import Cut
from dsengine.native.decoder import NativeDecoder
from dsengine.native.library import library
from dsengine.native.linear import Int8Linears, NativeInt8Linear
from dsengine.pool import DTYPES
from dsengine.runner import Engine
from dshost.library import compiler
from dswire.errors import EngineFailed
from support.rank_threads import ThreadedEngine
from support.tiny_families import make_family
from support.tiny_llama import Reference, engine_config, generate, make_model, prompt_of
from support.whole_logits import logits_of

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@given(st.integers(0, 2**32), st.floats(1e-3, 1e6), st.integers(1, 3 * GROUP))
def test_no_element_is_off_by_more_than_half_a_scale(seed: int, size: float, columns: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantise(weight)
    assert q.dtype == torch.int8
    assert scale.shape == (5, -(-columns // GROUP))
    assert torch.equal(scale.bfloat16().float(), scale)
    each = widened(torch.ones(5, columns), scale)
    assert bool(((q * each - weight).abs() <= each * 0.5001).all())
    highest = torch.stack([group.abs().amax(1) for group in torch.split(q, GROUP, 1)])
    assert set(highest.flatten().tolist()) <= {126, 127}  # the range is used up


def test_a_group_of_zeros() -> None:
    weight = torch.zeros(2, 2 * GROUP)
    weight[0, 0] = -2
    y = Int8Linear(weight)(torch.ones(1, 2 * GROUP))
    torch.testing.assert_close(y, torch.tensor([[-2.0, 0.0]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, BLOCK_ROWS + 1])
@pytest.mark.parametrize(("columns", "bias"), [(64, False), (64, True), (50, True)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
def test_product(
    rows: int, columns: int, bias: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_PIECE_ROWS", 10)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(37, columns, generator=generator).to(dtype)
    offset = torch.randn(37, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    q, scale = quantise(weight)
    want = functional.linear(x.float(), widened(q, scale), None if offset is None else offset.float())
    got = Int8Linear(weight, offset)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * 10)


def test_a_row_does_not_depend_on_its_batch() -> None:
    linear = Int8Linear(torch.randn(48, 64).bfloat16())
    x = torch.randn(BLOCK_ROWS, 64).bfloat16()
    assert torch.equal(linear(x)[3:4], linear(x[3:4]))


@pytest.mark.parametrize("border", [GROUP, 40])
def test_ranks_that_share_columns_round_as_one_would(border: int) -> None:
    weight, x = torch.randn(6, 100), torch.randn(3, 100)
    (q, scale), whole = quantise(weight), Int8Linear(weight)(x)
    left = weight[:, :border], None, Cut(0, lambda: peaks_of(weight[:, : 2 * GROUP]))
    right = weight[:, border:], None, Cut(border, lambda: peaks_of(weight[:, GROUP:]))
    rounded = [quantise(part, cut) for part, _, cut in (left, right)]
    assert torch.equal(torch.cat([part for part, _ in rounded], 1), q)
    assert torch.equal(rounded[1][1], scale[:, 1:])
    shares = Int8Linear(*left)(x[:, :border]) + Int8Linear(*right)(x[:, border:])
    torch.testing.assert_close(shares, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_stay_near_the_unquantised_model(tmp_path: Path, family: str, dtype: str) -> None:
    make_family(tmp_path, family, initializer_range=0.1)
    tokens = prompt_of(60)
    want = Reference(tmp_path).logits(tokens)
    for kernels in (True, False):
        engine = Engine(engine_config(tmp_path, dtype=dtype, quantization="int8", kernels=kernels))
        error = (logits_of(engine, tokens, 50) - want).norm() / want.norm()
        assert 1e-5 < float(error) < 0.05  # it is quantised, and it is near
        engine.close()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", [0, 40])
def test_single_products_on_the_kernels(dtype: str, start: int) -> None:
    generator = torch.Generator().manual_seed(start)
    whole, offset, x = (
        torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in ((37, 100), 37, (30, 100))
    )
    weight, x = whole[:, start:], x[:, start:]
    cut = Cut(start, lambda: peaks_of(whole[:, start // GROUP * GROUP :]))
    on_kernels = Int8Linears(library(dtype), 2)(weight, offset, cut)
    assert isinstance(on_kernels, NativeInt8Linear)
    q, scale = quantise(weight, cut)
    want = functional.linear(x.float(), widened(q, scale, start % GROUP), offset.float())
    y = on_kernels(x)
    assert y.dtype == x.dtype
    tolerance = 1e-4 if dtype == "float32" else 0.01
    torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(on_kernels(x[row : row + 1]), y[row : row + 1]) for row in range(len(x)))


@needs_compiler
def test_columns_that_do_not_pair_up_go_through_torch() -> None:
    make = Int8Linears(library("bfloat16"), 1)
    assert isinstance(make(torch.randn(3, 35)), Int8Linear)
    cut = Cut(33, lambda: torch.ones(3, 2))
    assert isinstance(make(torch.randn(3, 36), None, cut), Int8Linear)


@needs_compiler
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen2-moe"])
def test_kernels_and_torch_have_the_same_weights(tmp_path: Path, family: str) -> None:
    make_family(tmp_path, family, initializer_range=0.1)
    on_kernels, in_torch = (
        Engine(engine_config(tmp_path, quantization="int8", kernels=kernels)) for kernels in (True, False)
    )
    assert isinstance(on_kernels._model, NativeDecoder)
    tokens = prompt_of(40)
    torch.testing.assert_close(
        logits_of(on_kernels, tokens, 30), logits_of(in_torch, tokens, 30), rtol=0, atol=1e-4
    )


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_kernels_a_row_has_the_same_bits_however_it_is_reached(tmp_path: Path, dtype: str) -> None:
    make_family(tmp_path, "qwen2", initializer_range=0.1)
    engine, tokens = Engine(engine_config(tmp_path, dtype=dtype, quantization="int8", threads=2)), prompt_of(40)
    assert isinstance(engine._model, NativeDecoder)
    whole = logits_of(engine, tokens, 40)
    for chunks in ([], [1, 15, 14], [5, 12]):
        assert torch.equal(logits_of(engine, tokens, *chunks), whole)
    engine.close()


@pytest.mark.parametrize("kernels", [True, False])
def test_greedy_tokens_do_not_depend_on_the_batch(tmp_path: Path, kernels: bool) -> None:
    make_model(tmp_path)
    engine = Engine(engine_config(tmp_path, dtype="bfloat16", quantization="int8", kernels=kernels))
    prompts = [prompt_of(length) for length in (20, 20, 20)]
    together = generate(engine, prompts, 10)
    assert together == [generate(engine, [prompt], 10)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("family", "kernels"), [("qwen2", True), ("gpt2", True), ("qwen2-moe", True), ("qwen2-moe", False)]
)
def test_greedy_tokens_do_not_depend_on_the_shares(tmp_path: Path, family: str, kernels: bool) -> None:
    make_family(tmp_path, family, initializer_range=0.1)
    prompts = [prompt_of(length) for length in (1, 20, 37)]
    whole = Engine(engine_config(tmp_path, quantization="int8", kernels=kernels))
    shared = ThreadedEngine(tmp_path, 2, 2, quantization="int8", kernels=kernels)
    assert generate(shared, prompts, 5) == generate(whole, prompts, 5)
    shared.close()


def test_what_is_not_to_be_had() -> None:
    with pytest.raises(EngineFailed, match="'int4' is not one of int8"):
        engine_config(Path("m"), quantization="int4")
    with pytest.raises(EngineFailed, match="int8 weights are for the cpu"):
        engine_config(Path("m"), quantization="int8", device="cuda:0")
