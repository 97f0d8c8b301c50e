"""A converted GGUF file is the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsengine.gguf import convert
from dsengine.snapshot import check
from dsengine.text import Text
from dswire.errors import UnsupportedModel
from support.tiny_gguf import BOS, EOS, tiny_llama, write_gguf
from support.tokenizers_here import real_model, real_text


def converted(tmp_path: Path, **options: Any) -> Path:
    target = tmp_path / "converted"
    target.mkdir()
    convert(write_gguf(tmp_path / "tiny.gguf", **options), target)
    return check(target)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_source(tmp_path: Path, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(converted(tmp_path, tied=tied)))
    expected = tiny_llama(tied=tied).state_dict()
    found = model.state_dict()
    assert model.config.tie_word_embeddings is tied
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    text = Text(converted(tmp_path))
    assert text.eos_ids == {EOS}
    assert text.special_ids >= {BOS, EOS}
    assert text.decode(text.encode("né 🙂")) == "né 🙂"
    assert text.render_chat([{"role": "user", "content": "a"}]) == [BOS, *text.encode("a")]


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["  ", "1"]), ("gpt-2", [" ", " ", "1"])])
def test_digits_stand_apart_where_the_model_wants_it(tmp_path: Path, pre: str, expected: list[str]) -> None:
    text = Text(converted(tmp_path, pre=pre))
    assert [text.decode([token_id]) for token_id in text.encode("  1")] == expected


def test_steps_are_reported_in_order(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    (tmp_path / "target").mkdir()
    convert(
        write_gguf(tmp_path / "tiny.gguf"),
        tmp_path / "target",
        lambda step, done, total: steps.append((step, done, total)),
    )
    assert list(dict.fromkeys(step for step, _, _ in steps)) == ["read", "tokenizer", "weights", "write"]
    assert all((step, total, total) in steps for step, total in [("read", 1), ("tokenizer", 1), ("write", 1)])


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    converted(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_rope_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="RoPE"):
        converted(tmp_path, rope_table=True)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    (tmp_path / "target").mkdir()
    with pytest.raises(UnsupportedModel, match=r"bad\.gguf"):
        convert(tmp_path / "bad.gguf", tmp_path / "target")


@pytest.mark.process
def test_the_real_model_talks_sense() -> None:
    model = AutoModelForCausalLM.from_pretrained(str(real_model()))
    prompt = real_text().render_chat([{"role": "user", "content": "What is the capital of France?"}])
    made = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert real_text().decode(made.tolist()) == "The capital of France is Paris."
    assert int(made[-1]) in real_text().eos_ids
