"""A model's text side: from strings and chats to token ids, and back.

The tokenizer runs on ``tokenizers`` and Jinja alone, without transformers: that class of theirs is a wrapper
around the same Rust object, and importing it brings torch along (4.7 s and 385 MiB against 0.3 s and 67 MiB,
measured with release 5). What the wrapper adds is done here: tokens that only ``tokenizer_config.json`` lists, no
truncation and no padding, the chat template. BOS and EOS are put by the post-processor of ``tokenizer.json``, as in
release 5. The tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from dsengine.chat import ChatTemplate
from dswire.errors import InvalidRequest, ModelNotFound

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Text:
    """The tokenizer of the Hugging Face directory ``model_dir``. Immutable, and safe to share between threads.

    Raises :class:`ModelNotFound` when a file that it needs is missing or damaged, :class:`UnsupportedModel`
    when the chat template cannot be read.
    """

    #: ids that the model's embedding has a row for: 0 .. vocab_size - 1
    vocab_size: int
    #: ids that end a text; may be empty
    eos_ids: frozenset[int]
    #: ids of the tokens that are no text, such as the ends of turns
    special_ids: frozenset[int]
    #: characters of the longest token: no text longer than ``n * max_token_chars`` fits into n tokens.
    #: Holds where every character of the text ends up in a token, as in byte-level and byte-fallback vocabularies
    max_token_chars: int

    def __init__(self, model_dir: Path) -> None:
        settings = _read_json(model_dir / "tokenizer_config.json", required=False)
        config = _read_json(model_dir / "config.json")
        generation = _read_json(model_dir / "generation_config.json", required=False)
        self.special_tokens = _special_tokens(settings)
        self.tokenizer = _load(model_dir / "tokenizer.json", settings)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.max_token_chars = max(map(len, vocabulary), default=1)
        self.vocab_size = int(config.get("vocab_size") or max(vocabulary.values(), default=-1) + 1)
        self.eos_ids = _eos_ids(generation if "eos_token_id" in generation else config)
        source = _template_source(model_dir, settings)
        self._chat = ChatTemplate(source, self.special_tokens) if source is not None else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with BOS where the model wants it. Special tokens in it count as such."""
        return self.tokenizer.encode(text, add_special_tokens=True).ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat, up to where the assistant begins. Raises as :meth:`ChatTemplate.render` does,
        and :class:`InvalidRequest` when the model has no chat template."""
        if self._chat is None:
            raise InvalidRequest("the model has no chat template", remedy="send a plain prompt instead")
        return self.tokenizer.encode(self._chat.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; bytes that are no UTF-8 come out as U+FFFD, ids without a token as nothing."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _load(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelNotFound(f"{path} cannot be read: {error}", remedy="fetch the model again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, settings)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """The tokens that only ``tokenizer_config.json`` knows."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    listed = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokenizer.add_tokens(
        [
            AddedToken(**{field: token[field] for field in fields if field in token})
            for _, token in listed
            if token["content"] not in known
        ]
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, from strings or from the older form ``{"content": ...}``."""
    found: dict[str, str] = {}
    for name in _SPECIAL:
        match settings.get(name):
            case str(content) | {"content": str(content)}:
                found[name] = content
    return found


def _eos_ids(config: Mapping[str, Any]) -> frozenset[int]:
    match config.get("eos_token_id"):
        case int(one):
            return frozenset({one})
        case list(many):
            return frozenset(int(one) for one in many)
    return frozenset()


def _template_source(model_dir: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: of ``chat_template.jinja``, else of ``tokenizer_config.json`` (one, or named ones)."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    match settings.get("chat_template"):
        case str(source):
            return source
        case list(named):
            return {each["name"]: str(each["template"]) for each in named}.get("default")
    return None


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelNotFound(f"{path} cannot be read: {error}", remedy="fetch the model again") from error
