"""What an instance's machine asks of its engine, and what comes back.

A step runs over spans: of a prompt the whole or a chunk, of a sequence that decodes the token drawn last. Every
run of a step comes back in ``made`` or in ``failed``.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from dskv.handle import KvKey
from dswire.errors import ErrorInfo
from dswire.messages.client import Sampling
from dswire.messages.worker import Logprobs

# actions


@dataclass(frozen=True, slots=True)
class StartSequence:
    """The sequence will take part in steps: make its sampler."""

    key: KvKey
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class ForgetSequence:
    """The sequence is gone: drop its sampler and whatever else is kept for it."""

    key: KvKey


class Run(msgspec.Struct, frozen=True):
    """One sequence of a step."""

    key: KvKey
    tokens: tuple[int, ...]
    #: position of the first; the KV of everything before it lies in ``blocks``
    start: int
    blocks: tuple[int, ...]
    #: whether the token behind the last is drawn; False while more of the prompt is to come
    draws: bool

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run one step; ends with :class:`Stepped`. Steps end in the order in which they were asked for."""

    number: int
    runs: tuple[Run, ...]
    #: up to so many steps may be run as one, each from the tokens of the one before, their blocks not yet taken
    repeat: int = 1


# events


class Made(msgspec.Struct, frozen=True):
    """What a step did for one sequence."""

    key: KvKey
    #: None behind a chunk that is not the prompt's last
    token: int | None
    logprobs: Logprobs | None = None
    #: the tokens of the steps behind, where several were run as one
    more: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step is done."""

    now: float
    number: int
    made: tuple[Made, ...]
    #: how long the engine was at it
    seconds: float
    failed: tuple[tuple[KvKey, ErrorInfo], ...] = ()
