"""From arguments to the message."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest

from dsclient.request import SamplingFields, build_submit, new_request_id
from dswire.codec import MAX_FRAME_NBYTES
from dswire.errors import InvalidRequest, PromptTooLong
from dswire.messages.client import ChatMessage, Sampling, Submit


def build(**given: Any) -> Submit:
    """``build_submit`` with the arguments sorted as a client's method would."""
    own = {"prompt", "chat", "prompt_ids", "sampling", "request_id", "deadline_s"}
    fields: Any = {name: value for name, value in given.items() if name not in own}
    defaults: dict[str, Any] = {"sampling": None, "request_id": "r", "deadline_s": None}
    return build_submit(**defaults | {name: given[name] for name in own & given.keys()}, fields=fields)


def test_keyword_arguments_are_the_parameters_of_the_protocol() -> None:
    hints = get_type_hints(SamplingFields)
    assert list(hints) == list(Sampling.__struct_fields__)


def test_fields_go_on_top_of_a_sampling() -> None:
    submit = build(prompt="hi", sampling=Sampling(temperature=0.5, top_k=3), top_k=7, stop=["a", "b"])
    assert submit.sampling == Sampling(temperature=0.5, top_k=7, stop=("a", "b"))


def test_one_stop_string_is_one_stop_string() -> None:
    assert build(prompt="hi", stop="END").sampling.stop == ("END",)


def test_chat_takes_mappings_and_messages() -> None:
    turns = [{"role": "system", "content": "be brief"}, ChatMessage("user", "hi")]
    assert build(chat=turns).chat == (ChatMessage("system", "be brief"), ChatMessage("user", "hi"))


def test_ids_are_fresh() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
    assert build(prompt="hi", request_id=None).request_id != build(prompt="hi", request_id=None).request_id


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "none of them given"),
        ({"prompt": "hi", "prompt_ids": [1]}, "prompt and prompt_ids given"),
        ({"prompt": "hi", "chat": []}, "prompt and chat given"),
        ({"prompt": 7}, r"\$\.prompt"),
        ({"prompt": b"hi"}, r"got `bytes` - at `\$\.prompt`"),
        ({"chat": [{"role": "user", "content": bytearray(b"hi")}]}, r"\$\.chat\[0\]\.content"),
        ({"prompt": "hi", "stop": b"hi"}, r"\$\.sampling\.stop"),
        ({"prompt_ids": ["one"]}, r"\$\.prompt_ids\[0\]"),
        ({"prompt_ids": [2**70]}, "wrong type"),
        ({"prompt": "\ud800"}, "wrong type"),
        ({"chat": [{"role": "user"}]}, "role and content"),
        ({"chat": ["hi"]}, "role and content"),
        ({"prompt": "hi", "temperature": "hot"}, r"\$\.sampling\.temperature"),
        ({"prompt": "hi", "max_tokens": 1.5}, r"\$\.sampling\.max_tokens"),
        ({"prompt": "hi", "stop": [1]}, r"\$\.sampling\.stop"),
        ({"prompt": "hi", "heat": 1}, "no sampling parameter 'heat'"),
        ({"prompt": "hi", "request_id": 5}, r"\$\.request_id"),
        ({"prompt": "hi", "deadline_s": object()}, "wrong type"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        build(**given)


def test_a_misspelt_parameter_is_guessed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        build(prompt="hi", temprature=1.0)
    assert caught.value.remedy == "did you mean temperature?"


def test_ranges_are_left_to_the_router() -> None:
    assert build(prompt="", temperature=-5, max_tokens=0).sampling == Sampling(temperature=-5, max_tokens=0)


def test_more_than_a_frame_is_too_long() -> None:
    with pytest.raises(PromptTooLong, match=str(MAX_FRAME_NBYTES)):
        build(prompt="x" * MAX_FRAME_NBYTES)


def test_integers_do_for_floats() -> None:
    submit = build(prompt="hi", temperature=0, deadline_s=5)
    assert msgspec.to_builtins(submit)["sampling"] == {"temperature": 0.0}
