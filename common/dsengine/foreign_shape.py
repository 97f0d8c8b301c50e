"""What the engine has to know, before it loads any weights, of a model that transformers' modules will run.

Everything is read by transformers' own configuration classes; what their modules make of it is checked when they
are loaded (:mod:`dsengine.foreign`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsengine.config_json import ConfigFile
from dswire.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignShape:
    """Shapes of a model."""

    #: value of ``architectures`` in the configuration
    name: str
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    #: positions that the model knows
    max_positions: int
    eos_ids: frozenset[int]
    #: tokens that a query of some or all layers sees, itself included; None for all
    window: int | None


def load_foreign_shape(model_dir: Path) -> ForeignShape:
    """The shape of ``model_dir``.

    Raises :class:`UnsupportedModel` for what is no plain causal language model of the installed transformers,
    quantised, or has layers other than full and sliding attention.
    """
    file = ConfigFile.load(model_dir)
    config = _hf_config(file)
    _refuse(file, config)
    heads = config.num_attention_heads
    return ForeignShape(
        name=file.architecture,
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
        eos_ids=file.eos_ids(),
        window=getattr(config, "sliding_window", None),
    )


def _hf_config(file: ConfigFile) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(file.path.parent, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModel(
            f"{file.path}: architecture {file.architecture} is not supported: transformers does not know it either"
        ) from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None or model_class.__name__ != file.architecture:
        raise UnsupportedModel(
            f"{file.path}: architecture {file.architecture} is not supported: it is no causal language model"
        )
    if not model_class._supports_attention_backend:
        raise UnsupportedModel(
            f"{file.path}: architecture {file.architecture} is not supported: its attention cannot be replaced"
        )
    return config


def _refuse(file: ConfigFile, config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    problems = [
        (getattr(config, "quantization_config", None) is not None, "quantised weights (quantization_config)"),
        (getattr(config, "is_encoder_decoder", False), "an encoder"),
        (bool(types), f"layers of {', '.join(sorted(types))}"),
        # They turn old keys anew as a sequence grows, and depend on the longest of a batch.
        (bool(kinds & {"dynamic", "longrope"}), "rope that depends on the length"),
        (heads % kv_heads != 0, f"{kv_heads} KV heads, which do not divide {heads} heads"),
        *((not isinstance(getattr(config, key, None), int), f"no {key}") for key in needed),
    ]
    found = [text for wrong, text in problems if wrong]
    if found:
        raise UnsupportedModel(f"{file.path}: {file.architecture} is not supported: {'; '.join(found)}")
