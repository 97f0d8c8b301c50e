"""The kernels of GPUs, without one: Triton's interpreter runs them here, and its compiler makes them for GPUs."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsengine.architecture import Architecture, AttentionRule
from dsengine.gpu import steps
from dsengine.gpu.graphs import DecodeGraphs, sizes_up_to
from dsengine.gpu.steps import GpuSteps, prove
from dsengine.model import load_shape
from dsengine.native.decoder import NativeDecoder
from dsengine.parallel import WHOLE
from dsengine.pool import KvPool
from dsengine.runner import Engine
from dsengine.span import Span
from dskv.layout import KvLayout
from dswire.errors import Failed
from support.tiny_families import make_family
from support.tiny_llama import Reference, engine_config, generate, prompt_of
from support.whole_logits import logits_of

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton is not made for this processor"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, where tests/gpu says more"),
]

CPU = torch.device("cpu")
#: each with something in its attention that the others have not
SOME = (
    "qwen3",
    "smollm3 with window",
    "gemma2",
    "gemma3",
    "phi3 with longrope",
    "gpt2 scaled by depth",
    "qwen2-moe",
)
RULES = [
    AttentionRule(),
    AttentionRule(window=130),
    AttentionRule(scale=0.2, softcap=20.0, window=7),
]
PROMPTS = [prompt_of(length) for length in (1, 17, 40, 16)]
COUNT = 5


def pool_of(kv_heads: int, head_dim: int, block_size: int, dtype: str = "float32") -> KvPool:
    return KvPool(KvLayout(2, kv_heads, head_dim, block_size, dtype), 4, CPU)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (5, 5, 24, 8), (4, 1, 256, 32)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_in_place_is_that_of_torch(
    dtype: str, shape: tuple[int, int, int, int], rule: AttentionRule
) -> None:
    heads, kv_heads, head_dim, block_size = shape
    prove(pool_of(kv_heads, head_dim, block_size, dtype), heads, rule)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what lies where nothing was written
@pytest.mark.parametrize("what", ["attend_rows", "merge_parts", "store_rows"])
def test_a_kernel_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    class Idle:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: None

    monkeypatch.setattr(f"dsengine.gpu.attention.{what}", Idle())
    with pytest.raises(Failed, match="off by"):
        prove(pool_of(2, 16, 16), 4, AttentionRule())


class Engines:
    """An engine on torch, and one on the kernels."""

    def __init__(self, path: Path, family: str, recorded: int = 0) -> None:
        config = dataclasses.replace(engine_config(make_family(path, family)), kernels=False)
        self.plain, self.fast = Engine(config), Engine(config)
        arch, model = load_shape(config.model_dir), self.fast._model
        assert isinstance(arch, Architecture)
        assert not isinstance(model, NativeDecoder)
        self.arch, self.model = arch, model
        self.steps: dict[int, RunAgain] = {}
        graphs = None
        if recorded:
            graphs = DecodeGraphs(model, self.fast.pool, arch.heads, arch.vocab_size, recorded, 256)
            with torch.inference_mode():
                graphs.record(self._record)
        self.fast._gpu = GpuSteps(model, self.fast.pool, arch.heads, graphs)

    def _record(self, size: int, step: Callable[[], None]) -> RunAgain:
        step()
        self.steps[size] = RunAgain(step)
        return self.steps[size]


class RunAgain:
    """In the place of a recorded step, which takes a GPU: one that is run anew."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self.runs = 0

    def replay(self) -> None:
        self.runs += 1
        self._step()


@pytest.mark.parametrize("family", SOME)
def test_a_model_on_the_kernels(tmp_path: Path, family: str) -> None:
    engines = Engines(tmp_path, family)
    tokens = prompt_of(52)
    got = logits_of(engines.fast, tokens, 7, 9, 2, 31)
    torch.testing.assert_close(got, Reference(tmp_path).logits(tokens), rtol=0, atol=2e-4)


def test_whole_batches(tmp_path: Path) -> None:
    engines = Engines(tmp_path, "qwen3")
    assert generate(engines.fast, PROMPTS, COUNT) == generate(engines.plain, PROMPTS, COUNT)


def test_recorded_steps_of_every_size(tmp_path: Path) -> None:
    engines = Engines(tmp_path, "gemma2", recorded=5)
    for some in (PROMPTS, PROMPTS[1:], PROMPTS[2:3]):
        assert generate(engines.fast, some, COUNT) == generate(engines.plain, some, COUNT)
    # three sequences take the step of four, and none needs that of two
    assert {size: one.runs for size, one in engines.steps.items()} == {1: COUNT - 1, 2: 0, 4: 2 * (COUNT - 1), 5: 0}
    # rows of nobody write nowhere, and what is no step of single tokens goes another way
    pool = engines.fast.pool
    before = pool.blocks.clone()
    engines.fast.forward([Span((3,), 20, (5, 9)), Span((4,), 0, (2,)), Span((4,), 3, (8,))], range(3))
    changed = (pool.blocks != before).any(1).nonzero().flatten().tolist()
    assert changed == [2, 8, 9]
    logits = engines.fast.forward([Span((3, 5), 0, (1,)), Span((4,), 7, (2,))], [1])
    assert logits is not None
    assert logits.shape[0] == 1


def test_what_is_recorded() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(5) == [1, 2, 4, 5]
    for most in (24, 64, 256, 500):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        assert all(larger - size <= max(size // 2, 4) for size, larger in pairwise(sizes))


def test_torch_serves_where_the_kernels_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Engines(tmp_path, "qwen3")
    given = engines.model, engines.arch, engine_config(tmp_path, max_batch=4), engines.fast.pool, WHOLE

    def wrong(*_: object) -> None:
        raise Failed("the kernels are off by 2")

    with caplog.at_level(logging.INFO, "dsengine"):
        served = steps.open_steps(*given)
        assert served is not None
        assert served._graphs is None
        assert "launched kernel by kernel, slower" in caplog.text
        monkeypatch.setattr(steps, "prove", wrong)
        assert steps.open_steps(*given) is None
        assert "goes through torch, several times slower: Failed: the kernels are off by 2" in caplog.text


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsengine.gpu import kernels

SAME = {"KV_HEADS": 2, "GROUP": 4, "DIM": 128, "DIM_PADDED": 128}
NUMBERS = {"rows": "*i32", "tables": "*i32", "slots": "*i32", "parts": "*fp32", "sums": "*fp32", "scale": "fp32"}

def make(name, item, capability, **constants):
    kernel = getattr(kernels, name)
    signature = {
        one: "constexpr" if one in constants else NUMBERS.get(one, "i32" if one.endswith("stride") else "*" + item)
        for one in kernel.arg_names
    }
    told = [place for place, one in enumerate(kernel.arg_names) if one not in constants and one != "scale"]
    even = {(place,): [["tt.divisibility", 16]] for place in told}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    return made

for capability in (80, 90):
    for item, tile in (("bf16", 64), ("fp16", 64), ("fp32", 32)):
        pool = {"BLOCK_STRIDE": 1 << 16, "BLOCK_SIZE": 16}
        make("store_rows", item, capability, HEADS=4, HEADS_PADDED=4, DIM=128, DIM_PADDED=128, **pool)
        tasks = (1, 16, 8, 0, 0.0), (16, 64, 1, 0, 0.0), (1, 16, 1, 4096, 30.0)
        for tokens, queries, parts, window, cap in tasks:
            task = {"TOKENS": tokens, "QUERIES": queries, "PARTS": parts, "WINDOW": window, "SOFTCAP": cap}
            made = make("attend_rows", item, capability, TILE=tile, **pool, **SAME, **task)
            # an Ada GPU gives a program 99 KiB; and keys come while those before them are worked on
            print(made.metadata.shared, "cp.async" in made.asm["ptx"])
        make("merge_parts", item, capability, PARTS=8, TOKENS=1, QUERIES=16, **SAME)
"""


def test_the_kernels_compile_for_gpus() -> None:
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    assert len(made) == 18
    assert all(int(shared) <= 99 << 10 for shared, _ in made), done.stdout
    assert all(ahead == "True" for _, ahead in made), done.stdout
