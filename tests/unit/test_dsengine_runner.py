"""The engine as the services use it: batches, resumption, reproducibility, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsengine.runner import Engine, StepItem
from dskv.memory import RankPools
from dskv.segment import Segment
from dswire.errors import EngineFailed, ModelNotFound, OutOfMemory, UnsupportedModel
from dswire.messages.client import Sampling
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

#: around the borders of blocks of 16, from one token to a long one
LENGTHS = (1, 15, 16, 17, 33, 150)
MIXED = (
    Sampling(temperature=0.9, top_p=0.8, seed=1, ignore_eos=True),
    GREEDY,
    Sampling(temperature=1.3, top_k=20, seed=2, frequency_penalty=0.5, ignore_eos=True, logprobs=2),
    Sampling(temperature=0, repetition_penalty=1.4, ignore_eos=True),
    Sampling(temperature=0.7, min_p=0.1, seed=1, ignore_eos=True),
    Sampling(temperature=1.0, seed=2**63, presence_penalty=1.0, ignore_eos=True),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(model_dir: Path) -> Iterator[Engine]:
    made = Engine(engine_config(model_dir))
    yield made
    made.close()


def test_model_info(engine: Engine) -> None:
    model = engine.model
    assert (model.vocab_size, model.layers, model.kv_heads, model.head_dim) == (VOCAB, 2, 2, 8)
    assert (model.max_model_len, model.dtype, set(model.eos_ids)) == (256, "float32", {2})
    assert engine.pool.layout.block_nbytes == 2 * 2 * 2 * 16 * 8 * 4


def test_greedy_batch_equals_transformers_and_one_at_a_time(engine: Engine, model_dir: Path) -> None:
    reference = Reference(model_dir)
    prompts = [prompt_of(length) for length in LENGTHS]
    together = generate(engine, prompts, 40)
    assert together == [reference.generate(prompt, 40) for prompt in prompts]
    assert together == [generate(engine, [prompt], 40)[0] for prompt in prompts]


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_block_size_changes_nothing(model_dir: Path, engine: Engine, block_size: int) -> None:
    other = Engine(engine_config(model_dir, block_size=block_size, num_blocks=400))
    prompts = [prompt_of(length) for length in LENGTHS]
    assert generate(other, prompts, 12) == generate(engine, prompts, 12)


def test_sampling_does_not_depend_on_the_batch(engine: Engine) -> None:
    prompts = [prompt_of(length) for length in LENGTHS]
    together = generate(engine, prompts, 20, MIXED)
    alone = [generate(engine, [p], 20, s)[0] for p, s in zip(prompts, MIXED, strict=True)]
    assert together == alone
    assert together == generate(engine, prompts[::-1], 20, MIXED[::-1])[::-1]


def test_seeds_matter(engine: Engine) -> None:
    samplings = [Sampling(seed=seed, ignore_eos=True) for seed in (1, 2, 1)]
    first, second, third = generate(engine, [prompt_of(5)] * 3, 20, samplings)
    assert first == third
    assert first != second


@pytest.mark.parametrize("done", [1, 5, 16])
def test_resuming_from_prompt_and_outputs_gives_the_same_tokens(engine: Engine, done: int) -> None:
    prompts = [prompt_of(length) for length in LENGTHS]
    whole = generate(engine, prompts, 24, MIXED)
    run = Run(engine)
    run.prefill(prompts, MIXED, [tokens[:done] for tokens in whole])
    for _ in range(24 - done - 1):
        run.decode(range(len(prompts)))
    assert [run.tokens(row) for row in range(len(prompts))] == [tokens[done:] for tokens in whole]


def test_sequences_come_and_go(engine: Engine) -> None:
    run = Run(engine)
    prompts = [prompt_of(length, seed=3) for length in (40, 3, 16)]
    run.prefill(prompts[:1], [GREEDY])
    run.decode([0])
    run.prefill(prompts[1:2], [GREEDY])
    run.decode([1, 0])
    run.release(0)
    run.prefill(prompts[2:], [GREEDY])  # into blocks that sequence 0 has left
    for _ in range(20):
        run.decode([2, 1])
    for row in (0, 1, 2):
        count = len(run.tokens(row))
        assert run.tokens(row) == generate(engine, [prompts[row]], count)[0]


def test_logprobs_come_with_the_step(engine: Engine, model_dir: Path) -> None:
    run = Run(engine)
    prompt = prompt_of(9)
    run.prefill([prompt], [Sampling(temperature=0, logprobs=3, ignore_eos=True)])
    run.decode([0])
    tokens = run.tokens(0)
    expected = Reference(model_dir).logits(prompt + tokens).log_softmax(-1)
    for step, sampled in enumerate(run.outputs[0]):
        row = expected[len(prompt) - 1 + step]
        assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=1e-4)
        assert sampled.top[0] == (sampled.token, sampled.logprob)
        assert [value for _, value in sampled.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_kv_pulled_into_another_engine_continues_there(model_dir: Path, tmp_path: Path) -> None:
    source = Engine(engine_config(model_dir, segment=tmp_path / "source"))
    target = Engine(engine_config(model_dir, segment=tmp_path / "target"))
    prompt = prompt_of(37)
    run = Run(source)
    run.prefill([prompt], [MIXED[0]])
    nbytes = source.pool.layout.block_nbytes
    with_kv = Segment.open(tmp_path / "source", 64, nbytes)
    assert target.pool.segment is not None
    moved = [40, 8, 21]
    for theirs, mine in zip(run.blocks[0], moved, strict=True):
        target.pool.segment.copy_from(with_kv, [theirs], [mine])
    sums = [
        RankPools.of(source.pool.layout, pool).checksum(blocks)
        for pool, blocks in ((with_kv, run.blocks[0]), (target.pool.segment, moved))
    ]
    assert sums[0] == sums[1]
    with_kv.close()
    token = run.tokens(0)[0]
    there = target.step([StepItem([token], 37, moved, target.sampler(MIXED[0], prompt, [token]))])
    run.decode([0])
    assert there == [run.outputs[0][1]]
    source.close()
    target.close()
    assert list(tmp_path.iterdir()) == []


def test_equal_prompts_give_equal_bytes(engine: Engine) -> None:
    run = Run(engine)
    prompt = prompt_of(21)
    run.prefill([prompt_of(60)], [GREEDY])
    run.release(0)
    run.prefill([prompt], [GREEDY])
    run.prefill([prompt_of(4), prompt], [GREEDY] * 2)
    blocks = engine.pool._blocks
    # Bit by bit: a checksum must not see what lay in a block before.
    assert torch.equal(blocks[run.blocks[1]][:, -8:], blocks[run.blocks[3]][:, -8:])
    torch.testing.assert_close(blocks[run.blocks[1]], blocks[run.blocks[3]])


def test_broken_numbers_of_one_sequence_stay_with_it(engine: Engine) -> None:
    prompts = [prompt_of(20), prompt_of(6)]
    expected = generate(engine, prompts, 3)
    run = Run(engine)
    run.prefill(prompts, [GREEDY] * 2)
    engine.pool._blocks[run.blocks[0]] = math.nan
    with pytest.raises(EngineFailed, match=r"rows \[0\]"):
        run.decode([0, 1])
    run.decode([1])  # nothing has moved: the good one can be asked for alone
    run.decode([1])
    assert run.tokens(1) == expected[1]
    run.release(0)
    assert generate(engine, prompts, 3) == expected


def test_an_empty_batch_is_no_work(engine: Engine) -> None:
    assert engine.step([]) == []


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_steps_mix_chunks_and_single_tokens(model_dir: Path, kernels: bool) -> None:
    engine = Engine(engine_config(model_dir, kernels=kernels))
    prompts = [prompt_of(length) for length in (40, 3, 100)]
    expected = generate(engine, prompts, 8, MIXED[:3])
    other = Engine(engine_config(model_dir, kernels=kernels))
    # nothing is drawn in the very first step
    assert other.step([StepItem(prompts[2][:9], 0, range(10), None)]) == [None]
    run = Run(engine)
    run.prefill(prompts[:2], MIXED[:2])
    blocks, sampler = list(range(40, 50)), engine.sampler(MIXED[2], prompts[2], [])
    chunks = [(0, 16), (16, 49), (49, 50), (50, 99)]
    for start, end in chunks:
        mixed = [StepItem(prompts[2][start:end], start, blocks, None), *run.items([0, 1])]
        nothing, *drawn = engine.step(mixed)
        assert nothing is None
        run.take([0, 1], drawn)
    first = engine.step([*run.items([1, 0]), StepItem(prompts[2][99:], 99, blocks, sampler)])
    run.take([1, 0], first[:2])
    assert first[2] is not None
    assert first[2].token == expected[2][0]
    assert [run.tokens(row) for row in (0, 1)] == [tokens[:6] for tokens in expected[:2]]


@pytest.mark.parametrize(
    ("tokens", "start", "blocks", "words"),
    [
        ([], 0, [0], "0 tokens from position 0"),
        ([5] * 257, 0, list(range(17)), "257 tokens from"),
        ([5, VOCAB], 0, [0], "vocabulary"),
        ([5, -1], 0, [0], "vocabulary"),
        ([5] * 33, 0, [0, 1], "33 tokens need 3 blocks, 2 came"),
        ([5], 0, [64], "pool of 64"),
        ([5], 0, [-1], "pool of 64"),
        ([5], 16, [0], "17 tokens need 2 blocks, 1 came"),
        ([5], 256, list(range(17)), "1 tokens from position 256"),
        ([5], -1, [0], "position -1"),
    ],
)
def test_a_step_refuses(engine: Engine, tokens: list[int], start: int, blocks: list[int], words: str) -> None:
    good = StepItem([5], 0, [63], engine.sampler(GREEDY, [5], []))
    with pytest.raises(EngineFailed, match=words):
        engine.step([good, StepItem(tokens, start, blocks, engine.sampler(GREEDY, tokens, []))])
    assert good.sampler is not None
    assert good.sampler.position == 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_model_len": 257}, UnsupportedModel, "256 positions"),
        ({"num_blocks": 2**40}, OutOfMemory, "bytes"),
        ({"device": "cuda:99"}, EngineFailed, "cuda:99 is not there"),
    ],
)
def test_start_refuses(model_dir: Path, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Engine(engine_config(model_dir, **changes))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        Engine(engine_config(tmp_path / "nowhere"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    edit_config(make_model(tmp_path), architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        Engine(engine_config(tmp_path))


def test_a_configuration_that_does_not_fit_its_weights_is_refused(tmp_path: Path) -> None:
    edit_config(make_model(tmp_path), num_key_value_heads=3)
    with pytest.raises(UnsupportedModel, match=r"k_proj\.weight has shape \[16, 48\].* asks for \[24, 48\]"):
        Engine(engine_config(tmp_path))


def test_closing_twice_is_harmless(model_dir: Path, tmp_path: Path) -> None:
    engine = Engine(engine_config(model_dir, segment=tmp_path / "kv"))
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == []
