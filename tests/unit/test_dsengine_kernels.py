"""The compiled kernels: the same bits whatever comes along, memory left clean, and life without a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsengine.families import load_architecture
from dsengine.native import library, structs
from dsengine.native.decoder import NativeDecoder, Share, obstacle
from dsengine.native.packing import OwnShelf, Packing, RawLinear
from dsengine.parallel import WHOLE, Alone
from dsengine.parts import Parts
from dsengine.pool import DTYPES, KvPool
from dsengine.runner import Engine
from dsengine.span import Span
from dsengine.weights import Checkpoint
from dshost.library import compiler
from dskv.layout import KvLayout
from dswire.errors import EngineFailed
from support.tiny_families import make_family
from support.tiny_llama import VOCAB, Reference, edit_config, engine_config, generate, make_model, prompt_of

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
#: positions of the longest sequence: more than two chunks of keys
LONGEST = 1200
BLOCKS = 3 * LONGEST // 16


class Bare:
    """A decoder and a pool, with nothing around them."""

    def __init__(self, model_dir: Path, dtype: str = "float32", threads: int = 1, block_size: int = 16) -> None:
        arch = load_architecture(model_dir)
        assert obstacle(arch) is None
        shelf, kernels = OwnShelf(), library.library(dtype)
        checkpoint = Checkpoint(model_dir, DTYPES[dtype], CPU)
        Packing(Parts(arch, checkpoint, RawLinear, WHOLE, RawLinear), kernels, shelf).run()
        share = Share(arch, DTYPES[dtype], WHOLE, Alone())
        self.decoder = NativeDecoder(share, shelf.packed(), kernels, LONGEST, threads)
        self.pool = KvPool(KvLayout(arch.layers, arch.kv_heads, arch.head_dim, block_size, dtype), BLOCKS, CPU)

    def logits(self, *spans: Span) -> Tensor:
        """Of the last row of each span; a copy."""
        ends = torch.tensor([len(span.tokens) for span in spans]).cumsum(0) - 1
        logits = self.decoder.forward(spans, ends.tolist(), self.pool)
        assert logits is not None
        return logits.clone()


def span(tokens: Sequence[int], start: int = 0, first_block: int = 0, end: int | None = None) -> Span:
    """``tokens[start:end]`` with every second block from ``first_block`` on."""
    return Span(tokens[start:end], start, range(first_block, first_block + 2 * (len(tokens) // 16 + 1), 2))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=LONGEST)


@pytest.fixture
def bare(model_dir: Path) -> Iterator[Callable[..., Bare]]:
    made: list[Bare] = []

    def make(**changes: object) -> Bare:
        made.append(Bare(model_dir, **changes))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.decoder.close()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [40, 511, 512, 513, 1100])
def test_a_row_has_the_same_bits_however_it_is_reached(bare: Callable[..., Bare], dtype: str, length: int) -> None:
    one, tokens = bare(dtype=dtype, threads=2), prompt_of(length)
    whole = one.logits(span(tokens))
    for cuts in ((length - 1,), (1, 17, length - 3), (length // 2, length - 1)):
        edges = [0, *cuts, length]
        for start, end in pairwise(edges):
            last = one.logits(span(tokens, start, 1, end))
        assert torch.equal(last, whole)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=20, deadline=None)
@given(others=st.lists(st.integers(1, 80), max_size=9), seed=st.integers(0, 1000))
def test_a_row_has_the_same_bits_whatever_comes_along(
    model_dir: Path, dtype: str, others: list[int], seed: int
) -> None:
    one, tokens = Bare(model_dir, dtype, threads=2), prompt_of(37, seed=seed)
    alone = one.logits(span(tokens))
    mates = [span(prompt_of(length, seed=i), 0, 20 + 12 * i) for i, length in enumerate(others)]
    half = len(mates) // 2
    together = one.logits(*mates[:half], span(tokens, 0, 1), *mates[half:])
    assert torch.equal(together[half], alone[0])
    one.decoder.close()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(6, 2, 64, None), (4, 4, 32, 100), (8, 1, 96, None), (9, 1, 32, None), (10, 5, 128, 70), (2, 1, 48, None)],
)
def test_single_tokens_together_have_the_bits_of_whole_prompts(
    tmp_path: Path, dtype: str, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    path = make_model(tmp_path, hidden_size=8 * heads, num_hidden_layers=1, **shape)
    edit_config(path, max_position_embeddings=LONGEST)
    if window:
        edit_config(path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window)
    for threads in (1, 2):
        one = Bare(path, dtype, threads)
        prompts, first, whole = [prompt_of(length) for length in (1, 66, 1100, 17, 513)], 0, []
        spans = []
        for tokens in prompts:
            blocks = range(first, first := first + len(tokens) // 16 + 1)
            whole.append(one.logits(Span(tokens, 0, blocks)))
            spans.append(Span(tokens[-1:], len(tokens) - 1, blocks))
        assert torch.equal(one.logits(*spans), torch.cat(whole))
        one.decoder.close()


@needs_compiler
def test_threads_change_no_bit(bare: Callable[..., Bare]) -> None:
    tokens = prompt_of(700)
    assert torch.equal(bare(threads=1).logits(span(tokens)), bare(threads=3).logits(span(tokens)))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_rows_that_share_experts_change_no_bit(tmp_path: Path, family: str, dtype: str) -> None:
    make_family(tmp_path, family, max_position_embeddings=LONGEST)
    one, two = (Bare(tmp_path, dtype, threads) for threads in (1, 2))
    prompts, first = [prompt_of(length, seed=length) for length in (1, 66, 17, 130, 40)], 0
    whole, spans = [], []
    for tokens in prompts:
        blocks = range(first, first := first + len(tokens) // 16 + 1)
        whole.append(one.logits(Span(tokens, 0, blocks)))
        spans.append(Span(tokens[-1:], len(tokens) - 1, blocks))
    assert torch.equal(one.logits(*spans), torch.cat(whole))
    mixed = two.logits(Span(prompts[3], 0, range(9)), Span(prompts[1], 0, range(9, 20)))
    assert torch.equal(mixed, torch.cat((whole[3], whole[1])))
    for bare in (one, two):
        bare.decoder.close()


@needs_compiler
@pytest.mark.parametrize("block_size", [1, 8, 24, 32])
def test_block_sizes_change_no_bit(bare: Callable[..., Bare], block_size: int) -> None:
    tokens = prompt_of(150)
    other = bare(block_size=block_size)
    got = other.logits(Span(tokens[:149], 0, range(BLOCKS)))
    got = other.logits(Span(tokens[149:], 149, range(BLOCKS)))
    assert torch.equal(got, bare().logits(span(tokens)))


@needs_compiler
def test_long_sequences_equal_transformers(bare: Callable[..., Bare], model_dir: Path) -> None:
    tokens = prompt_of(1100)
    want = Reference(model_dir).logits(tokens)[-1:]
    torch.testing.assert_close(bare(threads=2).logits(span(tokens)), want, rtol=0, atol=2e-4)


@needs_compiler
def test_nothing_is_left_behind_the_last_token_and_nothing_else_is_touched(bare: Callable[..., Bare]) -> None:
    one = bare()
    nbytes = one.pool.layout.block_nbytes
    memory = (ctypes.c_uint8 * (BLOCKS * nbytes)).from_address(one.pool.base)
    ctypes.memset(one.pool.base, 0xFF, len(memory))  # every number is NaN
    tokens = prompt_of(18)
    assert one.logits(Span(tokens[:17], 0, [3, 5])).isfinite().all()
    assert one.logits(Span(tokens[17:], 17, [3, 5])).isfinite().all()
    layout = one.pool.layout
    last = torch.frombuffer(memory, dtype=torch.float32, count=nbytes // 4, offset=5 * nbytes)
    shaped = last.view(-1, layout.block_size, layout.head_dim)
    assert shaped[:, :2].isfinite().all()
    assert not shaped[:, 2:].any()
    untouched = torch.frombuffer(memory, dtype=torch.uint8).view(BLOCKS, -1)[[0, 1, 2, 4, 6, 7]]
    assert (untouched == 0xFF).all()


def test_without_a_compiler_the_engine_runs_and_says_so(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.library.cache_clear()
    engine = Engine(engine_config(model_dir, kernels=True))
    assert "goes without compiled kernels" in caplog.text
    assert "install g++, or set CXX" in caplog.text
    made = generate(engine, [prompt_of(20)], 12)
    assert made == [Reference(model_dir).generate(prompt_of(20), 12)]
    engine.close()
    library.library.cache_clear()


@needs_compiler
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, "ALL", structs.ALL[::-1])
    with pytest.raises(EngineFailed, match="was built of other sources"):
        library.Library("float32")


@needs_compiler
def test_an_engine_on_kernels_draws_as_one_without(model_dir: Path) -> None:
    prompts = [prompt_of(length) for length in (3, 16, 40)]
    drawn = []
    for kernels in (True, False):
        engine = Engine(engine_config(model_dir, kernels=kernels))
        drawn.append(generate(engine, prompts, 30))
        engine.close()
        engine.close()
    assert drawn[0] == drawn[1]
    assert all(0 <= token < VOCAB for tokens in drawn[0] for token in tokens)
