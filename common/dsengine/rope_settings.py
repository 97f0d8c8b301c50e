"""What a model's configuration says about rotary position embedding. No torch here.

Invariant: a :class:`Rope` that comes out has every figure that its kind needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from dsengine.config_json import ConfigFile
from dswire.errors import UnsupportedModel

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

#: figures without which a kind means nothing
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding; ``dynamic`` equals ``default`` up to ``original_len``, and is refused beyond."""

    kind: Kind
    #: base of the geometric row of wavelengths
    theta: float
    #: how many times longer the context became by scaling
    factor: float
    #: llama3: wavelengths above ``original_len / low_freq_factor`` are stretched by ``factor``
    low_freq_factor: float
    #: llama3: wavelengths under ``original_len / high_freq_factor`` stay
    high_freq_factor: float
    #: positions that the model was trained on before scaling
    original_len: int
    #: part of a head's dimensions that is turned, the first ones
    fraction: float = 1.0
    #: what cosines and sines are multiplied by
    attention_factor: float = 1.0
    #: yarn: turns over ``original_len`` above which a wavelength stays
    beta_fast: float = 32.0
    #: yarn: turns over ``original_len`` under which a wavelength is stretched by ``factor``
    beta_slow: float = 1.0
    #: yarn: whether the dimensions at which the betas are reached are rounded outwards
    truncate: bool = True
    #: longrope: divisor of each frequency, for engines of at most ``original_len`` positions
    short_factors: tuple[float, ...] = ()
    #: longrope: the same for longer engines
    long_factors: tuple[float, ...] = ()


class _HfRope(msgspec.Struct):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_theta: float | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None


def read_rope(config: ConfigFile, *, theta: float = 10000.0, fraction: float = 1.0, of: str = "") -> Rope:
    """The rope of ``config``; ``theta`` and ``fraction`` are those of the family where the file has none.

    ``of`` is the layer type whose parameters are meant, for models that have several. Raises
    :class:`UnsupportedModel` for kinds that are not computed here.
    """
    stated: Mapping[str, Any] = config.get("rope_parameters", dict) or config.get("rope_scaling", dict) or {}
    return parse_rope(config, stated.get(of, stated), config.number("rope_theta", theta), fraction)


def parse_rope(config: ConfigFile, stated: Mapping[str, Any], theta: float, fraction: float = 1.0) -> Rope:
    """The rope of the parameters ``stated``; ``theta`` and ``fraction`` are used where they have none."""
    raw = msgspec.convert(stated, _HfRope)
    kind = raw.rope_type or raw.type or "default"
    kind = "longrope" if kind == "su" else kind  # its name in the first Phi-3 releases
    if kind not in _NEEDED:
        raise UnsupportedModel(f"{config.path}: rope type {kind!r} is not supported, only {', '.join(_NEEDED)}")
    missing = [key for key in _NEEDED[kind] if getattr(raw, key) is None]
    if missing:
        raise UnsupportedModel(f"{config.path}: rope type {kind!r} lacks {', '.join(missing)}")
    longest = config.integer("max_position_embeddings", 2048)
    original = raw.original_max_position_embeddings or config.integer("original_max_position_embeddings", longest)
    factor = raw.factor or (longest / original if kind == "longrope" else 1.0)
    return Rope(
        kind=kind,  # type: ignore[arg-type]  # checked against the keys of `_NEEDED`
        theta=raw.rope_theta or theta,
        factor=factor,
        low_freq_factor=raw.low_freq_factor or 1.0,
        high_freq_factor=raw.high_freq_factor or 1.0,
        original_len=original,
        fraction=raw.partial_rotary_factor or config.number("partial_rotary_factor", fraction),
        attention_factor=raw.attention_factor or _attention_factor(kind, raw, factor, original),
        beta_fast=raw.beta_fast or 32.0,
        beta_slow=raw.beta_slow or 1.0,
        truncate=raw.truncate is not False,
        short_factors=tuple(raw.short_factor or ()),
        long_factors=tuple(raw.long_factor or ()),
    )


def _attention_factor(kind: str, raw: _HfRope, factor: float, original: int) -> float:
    """Where the file states none: YaRN (arXiv 2309.00071, section 3.4), LongRoPE (arXiv 2402.13753)."""
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if kind == "yarn":
        stretch = 0.1 * math.log(factor)
        if raw.mscale and raw.mscale_all_dim:
            return (stretch * raw.mscale + 1) / (stretch * raw.mscale_all_dim + 1)
        return stretch + 1
    return 1.0
