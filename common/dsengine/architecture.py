"""The architecture of a model, read from the ``config.json`` of a Hugging Face directory.

Invariant: what :func:`load_architecture` returns is a model that :mod:`dsengine.llama` computes exactly; every
feature that it would not compute is refused with :class:`UnsupportedModel` that names it. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from dswire.errors import ModelNotFound, UnsupportedModel

#: values of ``architectures`` whose tensors and arithmetic are those of Llama
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding; ``dynamic`` equals ``default`` up to ``original_len``, and is refused beyond."""

    kind: Literal["default", "linear", "llama3", "dynamic"]
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


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shapes and switches of a Llama-like decoder."""

    name: str
    vocab_size: int
    hidden_size: int
    #: width of the MLP
    mlp_size: int
    layers: int
    heads: int
    #: divides ``heads``
    kv_heads: int
    head_dim: int
    norm_eps: float
    #: positions that the model knows
    max_positions: int
    #: the output head is the embedding
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope
    eos_ids: frozenset[int]


class _HfConfig(msgspec.Struct):
    """``config.json``; defaults as in transformers' LlamaConfig, unknown keys ignored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    architectures: list[str] = []
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None


class _HfRope(msgspec.Struct):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_theta: float | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0


class _HfGeneration(msgspec.Struct):
    """``generation_config.json``."""

    eos_token_id: int | list[int] | None = None


def load_architecture(model_dir: Path) -> Architecture:
    """Read ``config.json`` and, for the end-of-text tokens, ``generation_config.json`` of ``model_dir``.

    Raises :class:`ModelNotFound` where there is no readable configuration and :class:`UnsupportedModel` for what
    the engine lacks.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{model_dir}: there is no config.json",
            remedy="point model.path at a Hugging Face directory, or fetch one with `dsctl model pull`",
        )
    try:
        raw = msgspec.json.decode(path.read_bytes())
        name = _supported_name(path, raw)
        config = msgspec.convert(raw, _HfConfig)
    except msgspec.DecodeError as error:
        raise ModelNotFound(f"{path}: {error}", remedy="the file is damaged: fetch the model again") from error
    _refuse_features(path, config)
    return Architecture(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope=_rope(path, config),
        eos_ids=_eos_ids(model_dir, config),
    )


def _supported_name(path: Path, raw: object) -> str:
    names = raw.get("architectures") if isinstance(raw, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if name not in SUPPORTED:
        raise UnsupportedModel(
            f"{path}: architecture {name or 'unnamed'} is not supported",
            remedy=f"use a model of {' or '.join(SUPPORTED)}",
        )
    return str(name)


def _refuse_features(path: Path, config: _HfConfig) -> None:
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    problems = [
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (only silu)"),
        (config.sliding_window is not None, f"sliding_window {config.sliding_window}"),
        (config.quantization_config is not None, "quantised weights (quantization_config)"),
        (config.num_attention_heads % kv_heads != 0, f"{kv_heads} KV heads for {config.num_attention_heads} heads"),
        (
            config.head_dim is None and config.hidden_size % config.num_attention_heads != 0,
            f"hidden_size {config.hidden_size} over {config.num_attention_heads} heads",
        ),
    ]
    found = [text for wrong, text in problems if wrong]
    if found:
        raise UnsupportedModel(f"{path}: not supported: {'; '.join(found)}")


def _rope(path: Path, config: _HfConfig) -> Rope:
    raw = msgspec.convert(config.rope_parameters or config.rope_scaling or {}, _HfRope)
    kind = raw.rope_type or raw.type or "default"
    if raw.partial_rotary_factor != 1.0:
        raise UnsupportedModel(f"{path}: not supported: partial_rotary_factor {raw.partial_rotary_factor}")
    needed = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needed:
        raise UnsupportedModel(f"{path}: rope type {kind!r} is not supported, only {', '.join(needed)}")
    missing = [key for key in needed[kind] if getattr(raw, key) is None]
    if missing:
        raise UnsupportedModel(f"{path}: rope type {kind!r} lacks {', '.join(missing)}")
    return Rope(
        kind=kind,  # type: ignore[arg-type]  # checked against the keys of `needed`
        theta=raw.rope_theta or config.rope_theta,
        factor=raw.factor or 1.0,
        low_freq_factor=raw.low_freq_factor or 1.0,
        high_freq_factor=raw.high_freq_factor or 1.0,
        original_len=raw.original_max_position_embeddings or config.max_position_embeddings,
    )


def _eos_ids(model_dir: Path, config: _HfConfig) -> frozenset[int]:
    """As transformers' ``generate``: the generation configuration's tokens go before the model's."""
    eos = config.eos_token_id
    path = model_dir / "generation_config.json"
    if path.is_file():
        try:
            generation = msgspec.json.decode(path.read_bytes(), type=_HfGeneration)
        except msgspec.DecodeError as error:
            raise ModelNotFound(f"{path}: {error}", remedy="the file is damaged: fetch the model again") from error
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset((eos,))
