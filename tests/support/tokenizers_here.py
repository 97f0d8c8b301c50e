"""Tokenizers to test with: the real model's, and small ones of the other families, made here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dsengine.pull import pull
from dsengine.text import Text

REAL_MODEL = "smollm2-135m-instruct"


@cache
def real_model() -> Path:
    """The directory of the real small model; fetched on a machine that never had it."""
    return pull(REAL_MODEL)


@cache
def real_text() -> Text:
    """The text side of the real small model."""
    return Text(real_model())


def sentencepiece_like() -> Tokenizer:
    """As in Llama 2: spaces are ▁, what has no token is spelled in bytes, the first space of a text is dropped."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "ll", "▁hell", "▁w", "or", "▁wor", "he", "▁he"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "h"), ("l", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁", "w"), ("o", "r"), ("▁w", "or"), ("h", "e")]
    model = models.BPE(
        vocab={token: place for place, token in enumerate(vocabulary)} | {"▁hell": 300},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level(*, added: tuple[str, ...] = ()) -> Tokenizer:
    """As in GPT-2, without a merge: one token for each byte, and ``added`` as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in added])
    return tokenizer


def metaspace() -> Tokenizer:
    """Whole words behind ▁, decoded by Metaspace."""
    words = ["<unk>", "▁the", "▁cat", "▁sat", "s", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def save(
    path: Path,
    tokenizer: Tokenizer,
    *,
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    template: str | None = None,
) -> Path:
    """Write the text files of a Hugging Face directory; returns ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast"} | (settings or {})
    (path / "tokenizer_config.json").write_text(json.dumps(given))
    (path / "config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
