"""What the machine of a rank host must know."""

from __future__ import annotations

from dataclasses import dataclass

from dswire.messages.worker import ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """Settings of one rank host."""

    name: str
    #: tells two processes of one name apart
    incarnation: str
    model: ModelIdentity
    #: digest of what it must have in common with its instance
    form: str
    #: those that it is to run
    ranks: frozenset[int]
