"""From a call's arguments to the message that is sent.

Types are checked here, since a message of the wrong shape cannot even be read by the router; ranges, lengths and
everything that needs the model are the router's to judge, in one place for all languages.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeAlias, TypedDict

import msgspec
from msgspec.structs import replace

from dswire.codec import encode
from dswire.errors import InvalidRequest, PromptTooLong, ProtocolError
from dswire.messages.client import ChatMessage, Sampling, Submit

#: one turn: a ``ChatMessage``, or a mapping with ``role`` and ``content``
Turn: TypeAlias = ChatMessage | Mapping[str, str]


class SamplingFields(TypedDict, total=False):
    """The fields of :class:`~dswire.messages.client.Sampling`, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int
    logprobs: int | None
    n: int


def new_request_id() -> str:
    """A fresh id: 128 random bits."""
    return f"r-{secrets.token_hex(16)}"


def build_submit(
    *,
    prompt: str | None = None,
    chat: Iterable[Turn] | None = None,
    prompt_ids: Sequence[int] | None = None,
    sampling: Sampling | None,
    fields: SamplingFields,
    request_id: str | None,
    deadline_s: float | None,
) -> Submit:
    """The message. Raises :class:`InvalidRequest` or, above the frame limit, :class:`PromptTooLong`."""
    given = [
        name
        for name, value in (("prompt", prompt), ("chat", chat), ("prompt_ids", prompt_ids))
        if value is not None
    ]
    if len(given) != 1:
        told = " and ".join(given) if given else "none of them"
        raise InvalidRequest(f"exactly one of prompt, chat messages and prompt_ids is needed, {told} given")
    submit = Submit(
        request_id=new_request_id() if request_id is None else request_id,
        prompt=prompt,
        chat=None if chat is None else tuple(_turn(turn) for turn in chat),
        prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
        sampling=_sampling(sampling, fields),
        deadline_s=deadline_s,
    )
    return _checked(submit)


def _turn(turn: Turn) -> ChatMessage:
    if isinstance(turn, ChatMessage):
        return turn
    try:
        return ChatMessage(turn["role"], turn["content"])
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"a chat message needs role and content, got {turn!r}") from error


def _sampling(sampling: Sampling | None, fields: SamplingFields) -> Sampling:
    known = Sampling.__struct_fields__
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InvalidRequest(f"there is no sampling parameter {name!r}", remedy=remedy)
    stop = fields.get("stop")
    if isinstance(stop, str):
        fields = {**fields, "stop": (stop,)}
    return replace(sampling or Sampling(), **fields)


def _checked(submit: Submit) -> Submit:
    try:
        # left to itself it would make text of bytes, in base64
        plain = msgspec.to_builtins(submit, builtin_types=(bytes, bytearray, memoryview))
        checked = msgspec.convert(plain, Submit)
        encode(checked)
    except ProtocolError as error:
        raise PromptTooLong(error.message) from error
    except (msgspec.ValidationError, TypeError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"the request has a value of the wrong type: {error}") from error
    return checked
