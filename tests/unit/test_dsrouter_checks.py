"""What cannot be served is refused, with the parameter, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsrouter.checks import MAX_CHOICES, MAX_LOGPROBS, check_sampling, check_submit, check_tokens
from dswire.errors import InvalidRequest, PromptTooLong
from dswire.messages.client import ChatMessage, Sampling, Submit

NAN = math.nan


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_k": 0},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -100.0},
        {"frequency_penalty": 100.0},
        {"min_tokens": 256},
        {"max_tokens": 1},
        {"max_tokens": 10**9},
        {"n": MAX_CHOICES},
        {"logprobs": 0},
        {"logprobs": MAX_LOGPROBS},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"stop": ("x" * 256,) * 16},
        {"stop_token_ids": tuple(range(64))},
    ],
)
def test_what_is_allowed(good: dict[str, Any]) -> None:
    check_sampling(Sampling(**good))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"temperature": -0.1}, "temperature -0.1: must be at least 0 and at most 100"),
        ({"temperature": NAN}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top_k -1: must be at least 0"),
        ({"top_p": 0.0}, "top_p 0.0: must be at least 1e-06 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": NAN}, "min_p nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"presence_penalty": 101.0}, "presence_penalty 101.0"),
        ({"frequency_penalty": -101.0}, "frequency_penalty -101.0"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"min_tokens": 257}, "min_tokens 257 is above max_tokens 256"),
        ({"max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"n": 0}, "n 0: must be at least 1 and at most 64"),
        ({"n": 65}, "n 65"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"logprobs": 21}, "logprobs 21"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"stop": ("",)}, "a stop string of 0 characters: 1 to 256 are allowed"),
        ({"stop": ("x" * 257,)}, "a stop string of 257 characters"),
        ({"stop": ("x",) * 17}, "at most 16 stop strings"),
        ({"stop_token_ids": (1,) * 65}, "64 stop tokens"),
    ],
)
def test_what_is_not(bad: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_sampling(Sampling(**bad))
    assert told in str(refused.value)


@given(st.floats(), st.floats(), st.floats(), st.integers(-(2**70), 2**70), st.integers(-100, 100))
def test_whatever_passes_is_in_range(temperature: float, top_p: float, min_p: float, seed: int, n: int) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p, seed=seed, n=n)
    try:
        check_sampling(sampling)
    except InvalidRequest:
        return
    assert 0 <= temperature <= 100
    assert 0 < top_p <= 1
    assert 0 <= min_p <= 1
    assert -(2**63) <= seed < 2**64
    assert 1 <= n <= MAX_CHOICES


@pytest.mark.parametrize(
    "good",
    [
        Submit("r", prompt="hi"),
        Submit("A-z_0.9:x", prompt_ids=(1,)),
        Submit("x" * 128, chat=(ChatMessage("system", ""), ChatMessage("tool", "42"))),
        Submit("r", prompt="hi", deadline_s=0.001),
    ],
)
def test_submits_that_are_allowed(good: Submit) -> None:
    check_submit(good)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (Submit("", prompt="hi"), "request_id ''"),
        (Submit("x" * 129, prompt="hi"), "1 to 128 characters"),
        (Submit("a b", prompt="hi"), "request_id 'a b'"),
        (Submit("a\n", prompt="hi"), "request_id"),
        (Submit("r"), "given: none"),
        (Submit("r", prompt="hi", prompt_ids=(1,)), "given: ['prompt', 'prompt_ids']"),
        (Submit("r", prompt=""), "prompt is empty"),
        (Submit("r", prompt_ids=()), "prompt_ids is empty"),
        (Submit("r", chat=()), "chat is empty"),
        (Submit("r", chat=(ChatMessage("user", "hi"), ChatMessage("robot", "hi"))), "chat[1].role 'robot'"),
        (Submit("r", prompt="hi", deadline_s=0.0), "deadline_s 0.0"),
        (Submit("r", prompt="hi", deadline_s=-1.0), "deadline_s -1.0"),
        (Submit("r", prompt="hi", deadline_s=math.inf), "deadline_s inf"),
        (Submit("r", prompt="hi", deadline_s=NAN), "deadline_s nan"),
        (Submit("r", prompt="hi", sampling=Sampling(n=0)), "n 0"),
    ],
)
def test_submits_that_are_not(bad: Submit, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_submit(bad)
    assert told in str(refused.value)


def tokens(prompt: tuple[int, ...], **sampling: Any) -> None:
    check_tokens(prompt, Sampling(**sampling), vocab_size=100, room=8)


def test_tokens_that_the_model_has_and_that_fit() -> None:
    tokens((0, 99), stop_token_ids=(0, 99))
    tokens(tuple(range(7)))


@pytest.mark.parametrize(
    ("prompt", "sampling", "told"),
    [
        ((), {}, "the prompt has no tokens"),
        ((1, 100), {}, "prompt_ids has token 100, the model's tokens are 0 to 99"),
        ((-1,), {}, "prompt_ids has token -1"),
        ((1,), {"stop_token_ids": (3, 100)}, "stop_token_ids has token 100"),
    ],
)
def test_tokens_that_it_has_not(prompt: tuple[int, ...], sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        tokens(prompt, **sampling)
    assert told in str(refused.value)


def test_a_prompt_must_leave_room_for_a_token() -> None:
    with pytest.raises(PromptTooLong, match="8 tokens, prompt and output may have 8 together"):
        tokens(tuple(range(8)))
