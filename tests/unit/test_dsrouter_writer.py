"""The text of a choice over a tokenizer of single bytes: whole characters only, nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsengine.text import Text
from dsrouter.writer import ChoiceWriter
from dswire.messages.client import Sampling
from support.tokenizers_here import byte_level, save, sentencepiece_like


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(save(tmp_path_factory.mktemp("tokenizer"), byte_level()))


def write(text: Text, words: str, *stops: str) -> tuple[list[str], bool]:
    """What is shown after each token, the rest last; and whether a stop string was met."""
    writer = ChoiceWriter(text, Sampling(stop=stops))
    shown = []
    for token in text.encode(words):
        piece, stopped = writer.push(token)
        shown.append(piece)
        if stopped:
            return shown, True
    return [*shown, writer.flush()], False


def test_half_a_character_waits_for_its_other_half(text: Text) -> None:
    shown, stopped = write(text, "é€!")
    assert shown == ["", "é", "", "", "€", "!", ""]
    assert not stopped


def test_what_may_begin_a_stop_string_is_held_back(text: Text) -> None:
    assert write(text, "a STOP b", "STOP") == (["a", " ", "", "", "", ""], True)
    assert write(text, "a STEP", "STOP") == (["a", " ", "", "", "STE", "P", ""], False)


def test_what_was_held_back_comes_at_the_end(text: Text) -> None:
    assert write(text, "a ST", "STOP") == (["a", " ", "", "", "ST"], False)


def test_half_a_character_at_the_end_is_marked(text: Text) -> None:
    writer = ChoiceWriter(text, Sampling())
    first, *_ = text.encode("é")
    assert writer.push(first) == ("", False)
    assert writer.flush() == "\ufffd"


def test_a_single_token_has_a_text_of_its_own(text: Text) -> None:
    writer = ChoiceWriter(text, Sampling())
    assert [writer.token_text(token) for token in text.encode("hi")] == ["h", "i"]


@given(st.text(max_size=20), st.sampled_from(["ab", "aab", "é", "<|x|>"]))
def test_all_of_it_is_the_text_up_to_the_stop(text: Text, words: str, stop: str) -> None:
    shown, stopped = write(text, words, stop)
    before, found, _ = words.partition(stop)
    assert "".join(shown) == before
    assert stopped == bool(found)


def test_the_first_word_keeps_the_space_before_it(tmp_path: Path) -> None:
    pieces = Text(save(tmp_path, sentencepiece_like()))
    prompt = pieces.encode("hell")
    (word,) = pieces.encode("hell wor")[len(prompt) :]
    assert ChoiceWriter(pieces, Sampling(), prompt).push(word) == (" wor", False)
    assert ChoiceWriter(pieces, Sampling()).push(word) == ("wor", False)
