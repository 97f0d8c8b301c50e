"""Chat templates: from messages to the one string that the model was trained on.

The environment offers templates what transformers offers them (blocks trimmed, loop controls, ``tojson``
without HTML escapes, ``raise_exception``, ``strftime_now``, the ``generation`` tag), inside Jinja's immutable
sandbox: a template comes with the model, and is not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dswire.errors import InvalidRequest, UnsupportedModel


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; when serving, just its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. ``special_tokens`` are the names that it may use, as ``bos_token``."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, **special_tokens}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UnsupportedModel(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that ends where the assistant begins to speak.

        Raises :class:`InvalidRequest` when there is no message, or when the template refuses them (a role that
        it does not know, content of another kind than it can show).
        """
        if not messages:
            raise InvalidRequest("messages is empty", remedy="give at least one message")
        # as transformers does: templates cope with a key that is missing, but print the None of one that is there
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(messages=present, tools=None, documents=None, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}",
                remedy="give each message a role and a content that are strings, in the order that the model knows",
            ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
