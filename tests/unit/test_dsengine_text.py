"""Text says what transformers says, without importing it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dsengine.text import Text
from dswire.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from support.tokenizers_here import byte_level, real_model, real_text, save, sentencepiece_like

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  there\n\n"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "name": None},
        {"role": "user", "content": "日本語 🙂"},
    ],
]


calm = settings(deadline=None)


@cache
def theirs() -> Any:
    """transformers' tokenizer of the real model."""
    return AutoTokenizer.from_pretrained(str(real_model()))


@calm
@given(st.text())
def test_encode_is_transformers_encode(text: str) -> None:
    assert real_text().encode(text) == theirs().encode(text)


@calm
@given(st.lists(st.integers(0, 49_151)), st.booleans())
def test_decode_is_transformers_decode(token_ids: list[int], skip: bool) -> None:
    expected = theirs().decode(token_ids, skip_special_tokens=skip)
    assert real_text().decode(token_ids, skip_special_tokens=skip) == expected


@calm
@given(st.text(alphabet="aZ é€🙂日本語\n\t 0123<|im_end|>"))
def test_what_is_encoded_comes_back(text: str) -> None:
    assert real_text().decode(real_text().encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("messages", CHATS)
def test_chat_is_transformers_chat(messages: list[dict[str, Any]]) -> None:
    expected = theirs().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert real_text().render_chat(messages) == expected


def test_the_real_model_splits_digits_and_knows_its_turns() -> None:
    text = real_text()
    assert text.encode("<|im_start|>a<|im_end|>") == [1, *text.encode("a"), 2]
    assert [text.decode([each]) for each in text.encode("x\n    2024")] == ["x", "\n    ", *"2024"]


def test_facts_of_the_real_model() -> None:
    text = real_text()
    assert text.vocab_size == 49_152
    assert text.eos_ids == {2}
    assert {0, 1, 2} <= text.special_ids
    assert text.special_tokens["bos_token"] == "<|im_start|>"
    assert 10 < text.max_token_chars < 200


def test_no_heavy_import() -> None:
    program = (
        "import sys, dsengine.text, dsengine.detokenizer, dsengine.store, dsengine.pull\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("added", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_bos_as_transformers_puts_it(tmp_path: Path, added: dict[str, Any]) -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    given_settings = added | {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "__type": "AddedToken"}}
    model = save(tmp_path / "model", tokenizer, settings=given_settings)
    ids = Text(model).encode("héllo")
    assert ids == AutoTokenizer.from_pretrained(str(model)).encode("héllo")
    assert ids[0] == 256


def test_added_token_that_only_the_settings_know(tmp_path: Path) -> None:
    token = {"content": "<think>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = {"added_tokens_decoder": {"258": token | {"single_word": False}}}
    model = save(tmp_path / "model", byte_level(), settings=listed)
    assert Text(model).encode("<think>") == [258] == AutoTokenizer.from_pretrained(str(model)).encode("<think>")


def test_sentencepiece_as_transformers_does_it(tmp_path: Path) -> None:
    model = save(tmp_path / "model", sentencepiece_like())
    theirs = AutoTokenizer.from_pretrained(str(model))
    for text in ("hello world", " hello", "né 🙂"):
        ids = Text(model).encode(text)
        assert ids == theirs.encode(text)
        assert Text(model).decode(ids) == theirs.decode(ids)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    assert len(Text(save(tmp_path / "model", tokenizer)).encode("seven..")) == 7


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, {5}),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, {6, 7}),
        ({"eos_token_id": 5}, {}, {5}),
        ({}, None, set()),
        ({"eos_token_id": None}, None, set()),
    ],
)
def test_eos_ids(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: set[int]
) -> None:
    assert Text(save(tmp_path / "model", byte_level(), config=config, generation=generation)).eos_ids == expected


def test_vocabulary_is_that_of_the_embedding(tmp_path: Path) -> None:
    assert Text(save(tmp_path / "a", byte_level())).vocab_size == 258
    assert Text(save(tmp_path / "b", byte_level(), config={"vocab_size": 320})).vocab_size == 320


TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if message.skip %}{% continue %}{% endif %}
    {{- bos_token + message.content | tojson }}
    {% generation %}
    {{- ' é' | tojson }}
    {% endgeneration %}
{%- endfor %}
"""


def test_template_features_as_in_transformers(tmp_path: Path) -> None:
    model = save(tmp_path / "model", byte_level(), settings={"bos_token": "<bos>"}, template=TEMPLATE)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "<é>"},
        {"role": "assistant", "content": "no", "skip": True},
    ]
    theirs = AutoTokenizer.from_pretrained(str(model))
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Text(model).render_chat(messages) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "unknown role robot"),
        ([{"role": "user", "content": None}], "Undefined"),
        ([{"content": "x"}], "role"),
    ],
)
def test_messages_that_the_template_refuses(tmp_path: Path, messages: list[dict[str, Any]], reason: str) -> None:
    model = save(tmp_path / "model", byte_level(), settings={"bos_token": "<bos>"}, template=TEMPLATE)
    with pytest.raises(InvalidRequest, match=reason):
        Text(model).render_chat(messages)


def test_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRequest, match="refuses"):
        Text(save(tmp_path / "model", byte_level(), template=escape)).render_chat([{"role": "user"}])


def test_template_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="template"):
        Text(save(tmp_path / "model", byte_level(), template="{% if %}"))


def test_templates_in_the_settings(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    for place, given_template in enumerate(("plain", named)):
        model = save(tmp_path / str(place), byte_level(), settings={"chat_template": given_template})
        assert Text(model).decode(Text(model).render_chat([{"role": "user"}])) == "plain"


def test_model_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        Text(save(tmp_path / "model", byte_level())).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_missing_or_damaged_files(tmp_path: Path, name: str, content: str | None) -> None:
    model = save(tmp_path / "model", byte_level())
    (model / name).unlink()
    if content is not None:
        (model / name).write_text(content)
    with pytest.raises(ModelNotFound, match=name):
        Text(model)


def test_converted_config_is_plain() -> None:
    """The converted directory holds what other tools read, too."""
    config = json.loads((real_model() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
