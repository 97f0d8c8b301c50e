"""What may be drawn, how often, and that nothing else than the row itself matters."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsengine.randomness import uniform
from dsengine.sampler import SamplerState, adjust, highest, probabilities, sample
from dswire.errors import EngineFailed
from dswire.messages.client import Sampling

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


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def state(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> SamplerState:
    return SamplerState(sampling, prompt or [], output or [], {2})


def draws(weights: list[float], count: int, **params: Any) -> Counter[int]:
    """``count`` tokens in a row from the same distribution."""
    one = state(Sampling(seed=11, **params))
    logits = torch.tensor([weights]).log().clamp(min=-1e4)
    return Counter(sample(logits, [one])[0].token for _ in range(count))


@given(st.lists(st.tuples(SAMPLINGS, TOKENS, TOKENS), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[Sampling, list[int], list[int]]], seed: int) -> None:
    logits = random_logits(seed, len(rows))
    together = sample(logits, [state(*row) for row in rows])
    alone = [sample(logits[i : i + 1], [state(*row)])[0] for i, row in enumerate(rows)]
    assert together == alone


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
    adjusted = adjust(logits[0], state(sampling, prompt, output))
    if len(output) < sampling.min_tokens:
        assert token not in {2, *sampling.stop_token_ids}
    if sampling.temperature > 0:
        assert probabilities(adjusted, sampling)[token] > 0
    else:
        assert token == int(adjusted.argmax())


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
    weights = probabilities(logits[0], sampling)
    torch.testing.assert_close((weights / weights.sum()).float(), expected[0].softmax(-1))


@given(TOKENS, TOKENS, st.sampled_from([0.5, 1.3]), st.integers(0, 2**31))
def test_repetition_penalty_equals_transformers(
    prompt: list[int], output: list[int], penalty: float, seed: int
) -> None:
    logits = random_logits(seed)
    ids = torch.tensor([[*prompt, *output]], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())[0]
    got = adjust(logits[0], state(Sampling(temperature=0, repetition_penalty=penalty), prompt, output))
    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    sampling = Sampling(temperature=0, presence_penalty=1.0, frequency_penalty=0.5)
    got = adjust(torch.zeros(6), state(sampling, prompt=[0, 1], output=[1, 4, 4]))
    assert got.tolist() == [0, -1.5, 0, 0, -2.0, 0]


def test_adjusting_leaves_the_logits_alone() -> None:
    logits = random_logits(0)
    before = logits.clone()
    sample(logits, [state(Sampling(temperature=0, repetition_penalty=2.0, min_tokens=5), [1, 2], [3])])
    assert torch.equal(logits, before)


def test_frequencies_follow_the_probabilities() -> None:
    found = draws([0.5, 0.0, 0.3, 0.2], 5000)
    assert found[1] == 0
    # standard deviations are 35, 32 and 28
    assert abs(found[0] - 2500) < 150
    assert abs(found[2] - 1500) < 150
    assert abs(found[3] - 1000) < 150


def test_ends_are_banned_until_min_tokens_unless_the_model_end_is_ignored() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2], logits[0, 3] = 9, 8  # 2 is the model's end, 3 a stop token
    for ignore_eos, expected in ((False, [0, 0, 2]), (True, [2, 2, 2])):
        one = state(Sampling(temperature=0, min_tokens=2, stop_token_ids=(3,), ignore_eos=ignore_eos))
        assert [sample(logits, [one])[0].token for _ in range(3)] == expected


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 1000)
    logits[:, [400, 700]] = 1
    drawn = sample(logits, [state(Sampling(temperature=0)), state(Sampling(temperature=0, logprobs=1))])
    assert [sampled.token for sampled in drawn] == [400, 400]


@given(rows=st.integers(1, 3), vocab=st.integers(1, 400), values=st.sampled_from([2, 5, 1000]), seed=st.integers())
def test_the_first_of_the_highest_is_found(rows: int, vocab: int, values: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed % 2**32)
    logits = torch.randint(values, (rows, vocab), generator=random).float() - values
    assert highest(logits).tolist() == [line.index(max(line)) for line in logits.tolist()]


def test_ties_at_a_border_stay_together() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert probabilities(logits, Sampling(top_k=2, seed=0)).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert probabilities(logits, Sampling(top_p=0.75, seed=0)).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_top_p_beyond_the_first_glance() -> None:
    flat = torch.linspace(0, 0.5, 20_000)
    kept = int((probabilities(flat, Sampling(top_p=0.9, seed=0)) > 0).sum())
    ordered = flat.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assert kept == int((ordered < 0.9).sum()) + 1


def test_temperatures_at_the_edge() -> None:
    logits = random_logits(5)
    best = int(logits.argmax())
    for temperature in (0.0, 5e-324, 1e-30):
        assert sample(logits, [state(Sampling(temperature=temperature, seed=3))])[0].token == best
    assert 0 <= sample(logits, [state(Sampling(temperature=1e30, seed=3))])[0].token < VOCAB


@pytest.mark.parametrize("wanted", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_find_a_token(monkeypatch: pytest.MonkeyPatch, wanted: float) -> None:
    monkeypatch.setattr("dsengine.sampler.uniform", lambda seed, position: wanted)
    logits = torch.full((1, 9), -1e4)
    logits[0, 3:6] = 0.1
    assert sample(logits, [state(Sampling(seed=0))])[0].token == (3 if wanted == 0 else 5)


def test_the_draw_is_the_inverse_distribution_over_ids() -> None:
    one = state(Sampling(seed=77))
    logits = torch.zeros(1, 10)
    drawn = [sample(logits, [one])[0].token for _ in range(20)]
    assert drawn == [int(uniform(77, position) * 10) for position in range(20)]


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = random_logits(9)
    sampling = Sampling(temperature=0, repetition_penalty=3.0, logprobs=4)
    sampled = sample(logits, [state(sampling, prompt=list(range(VOCAB)))])[0]
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
def test_what_is_no_number_is_named_and_moves_nothing(bad: float) -> None:
    logits = random_logits(2, 3)
    logits[1, 7] = bad
    states = [state(Sampling(temperature=0)) for _ in range(3)]
    with pytest.raises(EngineFailed, match=r"rows \[1\] of a batch of 3"):
        sample(logits, states)
    assert [one.position for one in states] == [0, 0, 0]


def test_random_drawing_needs_a_seed() -> None:
    with pytest.raises(EngineFailed, match="seed"):
        state(Sampling(temperature=0.5))
    assert state(Sampling(temperature=0)).plain
