"""What may be drawn, how often, and that nothing else than the row itself matters, whoever draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsengine import drawing
from dsengine.drawing import adjust, highest, kept
from dsengine.native.decoder import NativeDecoder
from dsengine.randomness import uniform
from dsengine.runner import Engine
from dsengine.sampler import Drawing, SamplerState, sample
from dshost.library import compiler
from dswire.errors import EngineFailed
from dswire.messages.client import Sampling
from support.tiny_llama import engine_config, make_model

VOCAB = 50
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB, VOCAB + 1]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.999999]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    stop_token_ids=st.sampled_from([(), (3, 4)]),
    min_tokens=st.sampled_from([0, 2, 100]),
    logprobs=st.sampled_from([None, 0, 3]),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawing]:
    """What the compiled kernels draw, two threads of them."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    engine = Engine(engine_config(make_model(tmp_path_factory.mktemp("model")), threads=2))
    assert isinstance(engine._model, NativeDecoder)
    yield engine._model.draw
    engine.close()


@pytest.fixture(params=["torch", "kernels"])
def draw(request: pytest.FixtureRequest) -> Drawing:
    """Whoever draws."""
    found: Drawing = drawing.draw if request.param == "torch" else request.getfixturevalue("kernels")
    return found


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def state(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> SamplerState:
    return SamplerState(sampling, prompt or [], output or [], {2})


def adjusted(raw: Tensor, one: SamplerState) -> Tensor:
    """``raw`` ``[vocab_size]`` with the penalties of ``one``."""
    return adjust(raw[None], [one.draw])[0]


def weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """What each of ``logits`` ``[vocab_size]`` weighs in the draw."""
    return kept(logits[None], [state(sampling).draw])[0]


ROWS = st.lists(st.tuples(SAMPLINGS, TOKENS, TOKENS), min_size=1, max_size=4)
#: the fixtures that draw keep nothing
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(rows=ROWS, seed=st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch(
    draw: Drawing, rows: list[tuple[Sampling, list[int], list[int]]], seed: int
) -> None:
    logits = random_logits(seed, len(rows))
    together = sample(logits, [state(*row) for row in rows], draw)
    alone = [sample(logits[i : i + 1], [state(*row)], draw)[0] for i, row in enumerate(rows)]
    assert together == alone


@SHARED
@given(
    rows=ROWS,
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([VOCAB, 64, 128, 1300, 9001]),
    spread=st.sampled_from([0.0, 0.05, 1.0, 30.0]),
    steps=st.sampled_from([None, 0.5]),
)
@example([(Sampling(top_p=0.9, seed=1, logprobs=20), [], [])], 3, 9001, 0.0, None)
@example([(Sampling(top_k=2000, top_p=0.999999, min_p=1e-4, seed=1), [], [])], 3, 9001, 0.05, 0.5)
def test_kernels_and_torch_draw_the_same(
    kernels: Drawing,
    rows: list[tuple[Sampling, list[int], list[int]]],
    seed: int,
    vocab: int,
    spread: float,
    steps: float | None,
) -> None:
    logits = spread * random_logits(seed, len(rows), vocab)
    if steps is not None:  # many equal ones
        logits = (logits / steps).round() * steps
    wanted = [
        (msgspec.structs.replace(one, top_k=one.top_k * vocab // VOCAB), prompt, output)
        for one, prompt, output in rows
    ]
    for _ in range(2):
        by_torch = sample(logits, [state(*row) for row in wanted])
        assert sample(logits, [state(*row) for row in wanted], kernels) == by_torch
        logits = torch.nn.functional.pad(logits, (0, 3))[:, :vocab]  # rows that lie apart


@given(SAMPLINGS, TOKENS, st.integers(0, 2**31))
def test_a_resumed_sequence_goes_on_as_if_never_stopped(sampling: Sampling, prompt: list[int], seed: int) -> None:
    logits = random_logits(seed, 8)
    kept = state(sampling, prompt)
    through = [sample(logits[i : i + 1], [kept])[0] for i in range(8)]
    made = [sampled.token for sampled in through[:4]]
    fresh = state(sampling, prompt, made)
    assert [sample(logits[i : i + 1], [fresh])[0] for i in range(4, 8)] == through[4:]


@given(SAMPLINGS, TOKENS, TOKENS, st.integers(0, 2**31))
def test_no_forbidden_token_is_drawn(sampling: Sampling, prompt: list[int], output: list[int], seed: int) -> None:
    logits = random_logits(seed)
    token = sample(logits, [state(sampling, prompt, output)])[0].token
    left = adjusted(logits[0], state(sampling, prompt, output))
    if len(output) < sampling.min_tokens:
        assert token not in {2, *sampling.stop_token_ids}
    if sampling.temperature > 0:
        assert weights(left, sampling)[token] > 0
    else:
        assert token == int(left.argmax())


@given(SAMPLINGS, st.integers(0, 2**31))
def test_filters_equal_transformers(sampling: Sampling, seed: int) -> None:
    if sampling.temperature < 0.1:
        sampling = msgspec.structs.replace(sampling, temperature=0.7)
    logits = random_logits(seed)
    ids = torch.empty(1, 0, dtype=torch.long)
    expected = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(ids, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(ids, expected)
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(ids, expected)
    found = weights(logits[0], sampling)
    torch.testing.assert_close((found / found.sum()).float(), expected[0].softmax(-1))


@given(TOKENS, TOKENS, st.sampled_from([0.5, 1.3]), st.integers(0, 2**31))
def test_repetition_penalty_equals_transformers(
    prompt: list[int], output: list[int], penalty: float, seed: int
) -> None:
    logits = random_logits(seed)
    ids = torch.tensor([[*prompt, *output]], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())[0]
    got = adjusted(logits[0], state(Sampling(temperature=0, repetition_penalty=penalty), prompt, output))
    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    sampling = Sampling(temperature=0, presence_penalty=1.0, frequency_penalty=0.5)
    got = adjusted(torch.zeros(6), state(sampling, prompt=[0, 1], output=[1, 4, 4]))
    assert got.tolist() == [0, -1.5, 0, 0, -2.0, 0]


def test_adjusting_leaves_the_logits_alone() -> None:
    logits = random_logits(0)
    before = logits.clone()
    sample(logits, [state(Sampling(temperature=0, repetition_penalty=2.0, min_tokens=5), [1, 2], [3])])
    assert torch.equal(logits, before)


def test_frequencies_follow_the_probabilities(draw: Drawing) -> None:
    one = state(Sampling(seed=11))
    logits = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().clamp(min=-1e4)
    found = Counter(sample(logits, [one], draw)[0].token for _ in range(2000))
    assert found[1] == 0
    # standard deviations are 22, 20 and 18
    assert abs(found[0] - 1000) < 100
    assert abs(found[2] - 600) < 100
    assert abs(found[3] - 400) < 100


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.95}, {"top_k": 60}, {"top_k": 60, "top_p": 0.8}, {"min_p": 0.02}], ids=str
)
def test_draws_are_of_the_exact_distribution(kernels: Drawing, params: dict[str, Any]) -> None:
    sampling = Sampling(temperature=0.8, seed=5, **params)
    logits = random_logits(21, vocab=700)
    chances = _exact(logits[0].double() / 0.8, sampling)
    count = 4000
    states = [state(msgspec.structs.replace(sampling, seed=seed)) for seed in range(count // 40)]
    drawn = Counter(one.token for _ in range(40) for one in sample(logits.expand(len(states), -1), states, kernels))
    assert all(chances[token] > 0 for token in drawn)
    expected = chances * count
    often = expected > 5
    found = torch.tensor([drawn[token] for token in range(700)], dtype=torch.float64)
    chi = ((found - expected)[often] ** 2 / expected[often]).sum() + (
        (found - expected)[~often].sum() ** 2 / expected[~often].sum().clamp(min=1)
    )
    freedom = int(often.sum())
    # the seeds are fixed: this holds or does not hold, for ever
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def _exact(scaled: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that parameters ask for, in double precision, by sorting."""
    ordered, tokens = scaled.softmax(-1).sort(descending=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = 0
    ordered = ordered / ordered.sum()
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
    ordered[ordered < sampling.min_p * ordered[0]] = 0
    return torch.zeros_like(ordered).index_put((tokens,), ordered / ordered.sum())


def test_ends_are_banned_until_min_tokens_unless_the_model_end_is_ignored() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2], logits[0, 3] = 9, 8  # 2 is the model's end, 3 a stop token
    for ignore_eos, expected in ((False, [0, 0, 2]), (True, [2, 2, 2])):
        one = state(Sampling(temperature=0, min_tokens=2, stop_token_ids=(3,), ignore_eos=ignore_eos))
        assert [sample(logits, [one])[0].token for _ in range(3)] == expected


def test_ties_go_to_the_lowest_id(draw: Drawing) -> None:
    logits = torch.zeros(2, 1000)
    logits[:, [400, 700]] = 1
    drawn = sample(logits, [state(Sampling(temperature=0)), state(Sampling(temperature=0, logprobs=1))], draw)
    assert [sampled.token for sampled in drawn] == [400, 400]
    assert drawn[1].top[0][0] == 400


@given(rows=st.integers(1, 3), vocab=st.integers(1, 400), values=st.sampled_from([2, 5, 1000]), seed=st.integers())
def test_the_first_of_the_highest_is_found(rows: int, vocab: int, values: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed % 2**32)
    logits = torch.randint(values, (rows, vocab), generator=random).float() - values
    assert highest(logits).tolist() == [line.index(max(line)) for line in logits.tolist()]


def test_ties_at_a_border_stay_together() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert weights(logits, Sampling(top_k=2, seed=0)).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert weights(logits, Sampling(top_p=0.75, seed=0)).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_top_p_beyond_the_first_glance() -> None:
    flat = torch.linspace(0, 0.5, 20_000)
    found = int((weights(flat, Sampling(top_p=0.9, seed=0)) > 0).sum())
    ordered = flat.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assert found == int((ordered < 0.9).sum()) + 1


def test_temperatures_at_the_edge(draw: Drawing) -> None:
    logits = random_logits(5)
    best = int(logits.argmax())
    for temperature in (0.0, 5e-324, 1e-30):
        assert sample(logits, [state(Sampling(temperature=temperature, seed=3))], draw)[0].token == best
    assert 0 <= sample(logits, [state(Sampling(temperature=1e30, seed=3))], draw)[0].token < VOCAB


@pytest.mark.parametrize("wanted", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_find_a_token(monkeypatch: pytest.MonkeyPatch, draw: Drawing, wanted: float) -> None:
    monkeypatch.setattr("dsengine.sampler.uniform", lambda seed, position: wanted)
    logits = torch.full((1, 9), -1e4)
    logits[0, 3:6] = 0.1
    for top_p in (1.0, 0.99):
        one = state(Sampling(top_p=top_p, seed=0))
        assert sample(logits, [one], draw)[0].token == (3 if wanted == 0 else 5)


def test_the_draw_is_the_inverse_distribution_over_ids(draw: Drawing) -> None:
    one = state(Sampling(seed=77))
    logits = torch.zeros(1, 10)
    drawn = [sample(logits, [one], draw)[0].token for _ in range(20)]
    assert drawn == [int(uniform(77, position) * 10) for position in range(20)]


def test_logprobs_are_those_of_the_model_itself(draw: Drawing) -> None:
    logits = random_logits(9)
    sampling = Sampling(temperature=0, repetition_penalty=3.0, logprobs=4)
    sampled = sample(logits, [state(sampling, prompt=list(range(VOCAB)))], draw)[0]
    expected = logits[0].log_softmax(-1)
    assert sampled.logprob == pytest.approx(float(expected[sampled.token]))
    best = expected.sort(descending=True)
    assert [token for token, _ in sampled.top] == best.indices[:4].tolist()
    assert [value for _, value in sampled.top] == pytest.approx(best.values[:4].tolist())


def test_logprobs_zero_gives_the_drawn_token_alone_and_none_gives_nothing() -> None:
    drawn = sample(
        random_logits(9, 2),
        [state(Sampling(temperature=0, logprobs=0)), state(Sampling(temperature=0))],
    )
    assert drawn[0].logprob is not None
    assert drawn[1].logprob is None
    assert [sampled.top for sampled in drawn] == [(), ()]


def test_more_logprobs_than_tokens() -> None:
    sampled = sample(random_logits(1, vocab=3), [state(Sampling(temperature=0, logprobs=20))])[0]
    assert len(sampled.top) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named_and_moves_nothing(draw: Drawing, bad: float) -> None:
    logits = random_logits(2, 3)
    logits[1, 7] = bad
    states = [state(Sampling(temperature=0)) for _ in range(3)]
    with pytest.raises(EngineFailed, match=r"rows \[1\] of a batch of 3"):
        sample(logits, states, draw)
    assert [one.position for one in states] == [0, 0, 0]


def test_random_drawing_needs_a_seed() -> None:
    with pytest.raises(EngineFailed, match="seed"):
        state(Sampling(temperature=0.5))
    assert state(Sampling(temperature=0)).position == 0
