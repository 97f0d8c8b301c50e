"""What a decode machine must know."""

from __future__ import annotations

from dataclasses import dataclass

from dssched.instance import InstanceConfig

#: hand-offs that are under way at once; more would only share the same memory bandwidth
MAX_PULLS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(InstanceConfig):
    """Settings of one decode instance."""

    #: whether KV can come from elsewhere; False where every prompt is read here
    relayed: bool = True
    #: read all prompts before the next token of anybody, instead of beside it
    prefill_priority: bool = False
    #: whether the engine, or what stands for it, can run several steps as one
    repeats: bool = False
