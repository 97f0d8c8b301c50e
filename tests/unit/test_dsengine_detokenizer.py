"""Chunks of tokens add up to the whole text, and no chunk shows what a later one changes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from dsengine.detokenizer import Detokenizer, StopStrings
from dsengine.text import Text
from dswire.errors import InvalidRequest, UnsupportedModel
from support.tokenizers_here import byte_level, metaspace, real_text, save, sentencepiece_like


def text_of(tokenizer: Tokenizer) -> Text:
    with TemporaryDirectory() as directory:
        return Text(save(Path(directory), tokenizer))


calm = settings(deadline=None)


@cache
def spelled() -> Text:
    return text_of(sentencepiece_like())


@cache
def spaced() -> Text:
    return text_of(metaspace())


@cache
def bytewise() -> Text:
    return text_of(byte_level(added=("<think>", "a b", "é")))


def pieces(text: Text, chunks: Iterable[list[int]], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(text, skip_special_tokens=skip)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


def joined(chunks: list[list[int]]) -> list[int]:
    return [each for chunk in chunks for each in chunk]


def chunks_of(ids: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(ids, max_size=5), max_size=12)


@calm
@given(chunks_of(st.integers(0, 49_151)), st.booleans())
def test_pieces_add_up_for_the_real_model(chunks: list[list[int]], skip: bool) -> None:
    whole = real_text().decode(joined(chunks), skip_special_tokens=skip)
    assert "".join(pieces(real_text(), chunks, skip=skip)) == whole


# single bytes, good and bad, are where characters break
@calm
@given(chunks_of(st.integers(0, 262)), st.booleans())
def test_pieces_add_up_byte_by_byte(chunks: list[list[int]], skip: bool) -> None:
    whole = bytewise().decode(joined(chunks), skip_special_tokens=skip)
    assert "".join(pieces(bytewise(), chunks, skip=skip)) == whole


E2, X82, AC, FF, SPACE, H = 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xFF, 259, 267


@calm
@given(chunks_of(st.integers(0, 300)), st.booleans())
@example([[E2], [X82], [AC], [FF]], True)
@example([[E2], [X82], [AC], [SPACE]], True)
@example([[1], [SPACE], [2], [SPACE, H]], True)
@example([[SPACE], [SPACE], [H]], True)
def test_pieces_add_up_for_byte_fallback(chunks: list[list[int]], skip: bool) -> None:
    whole = spelled().decode(joined(chunks), skip_special_tokens=skip)
    assert "".join(pieces(spelled(), chunks, skip=skip)) == whole


@calm
@given(chunks_of(st.integers(0, 6)))
def test_pieces_add_up_for_metaspace(chunks: list[list[int]]) -> None:
    assert "".join(pieces(spaced(), chunks)) == spaced().decode(joined(chunks))


@calm
@given(st.text(alphabet="aé€🙂日本語\u0301👨‍👩‍👧"))
def test_no_piece_is_half_a_character(text: str) -> None:
    ids = real_text().encode(text)
    shown = pieces(real_text(), [[each] for each in ids])
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown)


def test_text_is_shown_as_soon_as_it_is_whole() -> None:
    ids = bytewise().encode("🙂!")
    assert pieces(bytewise(), [[each] for each in ids]) == ["", "", "", "🙂", "!", ""]


def test_bytes_without_an_end_come_with_the_flush() -> None:
    half = bytewise().encode("🙂")[:2]
    assert pieces(bytewise(), [half]) == ["", "\ufffd"]
    assert pieces(spelled(), [[E2, X82]]) == ["", "\ufffd\ufffd"]


def test_special_tokens_are_shown_on_demand() -> None:
    ids = [*bytewise().encode("a"), 257]
    assert pieces(bytewise(), [ids]) == ["a", ""]
    assert pieces(bytewise(), [ids], skip=False) == ["a<eos>", ""]


def test_ids_without_a_token_are_nothing() -> None:
    assert pieces(bytewise(), [[99_999], *([each] for each in bytewise().encode("ok"))]) == ["", "o", "k", ""]
    assert pieces(spelled(), [[99_999], [H]]) == ["", spelled().decode([H]), ""]


@calm
@given(chunks_of(st.integers(259, 300)), st.lists(st.integers(259, 300), min_size=1, max_size=4))
def test_with_the_prompt_the_first_space_stays(chunks: list[list[int]], prompt: list[int]) -> None:
    detokenizer = Detokenizer(spelled(), prompt)
    shown = "".join([*map(detokenizer.push, chunks), detokenizer.flush()])
    assert spelled().decode(prompt) + shown == spelled().decode(prompt + joined(chunks))


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Strip(" ", 2, 0), decoders.Strip(" ", 0, 1)]
)
def test_decoder_that_looks_further_is_refused(decoder: decoders.Decoder) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoder
    with pytest.raises(UnsupportedModel, match="decoder"):
        Detokenizer(text_of(tokenizer))


def first_to_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: look at every prefix of the text."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


short = st.text(alphabet="ab\n", max_size=8)


@calm
@given(st.lists(short, max_size=8), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
@example(["abcd"], ["bcd", "c"])
@example(["a", "b", "c", "d"], ["bcd", "c"])
def test_stop_strings_do_not_depend_on_chunks(chunks: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        safe, _ = watcher.push(chunk)
        shown += safe
    shown += watcher.flush()
    assert (shown, watcher.found) == first_to_end("".join(chunks), stops)


@calm
@given(st.lists(short, max_size=8), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_needed(chunks: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    seen = shown = ""
    for chunk in chunks:
        safe, stop = watcher.push(chunk)
        seen, shown = seen + chunk, shown + safe
        if stop is not None:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_follows_a_stop() -> None:
    watcher = StopStrings(["END"])
    assert watcher.push("one EN") == ("one ", None)
    assert watcher.push("D two") == ("", "END")
    assert watcher.push("three") == ("", "END")
    assert watcher.flush() == ""


def test_empty_stop_string() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        StopStrings(["a", ""])
