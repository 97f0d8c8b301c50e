"""Shape of a decoder model, from a Hugging Face ``config.json`` or a name of ``data/models.json``.

Only what time and memory depend on: sizes of the matrices, heads, layers. Weights count the matrices and the
embeddings; norms and biases are far below one per cent and left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dshost.home import home
from dsplan.errors import PlanInput

#: bytes of a stored element by the name a config gives it
ITEM_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: families whose MLP has no gate: two matrices instead of three
UNGATED = frozenset(
    {"opt", "gpt2", "gptj", "gpt_neox", "bloom", "falcon", "gpt_bigcode", "phi", "starcoder2", "mpt"}
)
#: families that normalise each head of Q and of K
HEAD_NORMED = frozenset({"qwen3", "qwen3_moe", "olmo2", "olmoe", "gemma3", "gemma3_text", "glm4_moe"})
#: more layers, heads or width than any model has: a number in the wrong place
ABSURD = 10_000_000


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one decoder."""

    name: str
    #: width of the residual stream
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    #: width of the MLP
    intermediate: int
    vocab: int
    #: whether the MLP has a gate matrix
    gated: bool
    #: whether the output matrix is the embedding
    tied: bool
    #: bytes of one weight and of one KV element
    item_nbytes: int = 2
    #: whether heads of Q and K are normalised
    head_norms: bool = False
    #: of a mixture of experts: how many, those that a token goes to, and the width of one; 0 for dense models
    experts: int = 0
    active: int = 0
    expert_width: int = 0
    #: width of the experts that every token goes to
    shared_width: int = 0
    #: layers of a mixture that have the dense MLP of ``intermediate``
    dense_layers: int = 0
    #: tokens back that attention looks in a share of the layers, where that is bounded
    window: int = 0
    windowed: float = 0.0

    @property
    def sparse(self) -> float:
        """Share of the layers that are mixtures of experts."""
        return 1 - self.dense_layers / self.layers if self.experts else 0.0

    def hit_experts(self, tokens: float) -> float:
        """Distinct experts of a layer that ``tokens`` tokens go to, on average, were all equally liked."""
        return float(self.experts * (1 - (1 - self.active / self.experts) ** tokens))

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of a layer, the mean of all."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        width = self.intermediate
        if self.experts:
            mixed = self.experts * self.expert_width + self.shared_width
            width = round((1 - self.sparse) * width + self.sparse * mixed)
        return (
            attention
            + (3 if self.gated else 2) * self.hidden * width
            + round(self.sparse * self.experts * self.hidden)
        )

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all weights."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return (self.layers * self.layer_weights + embeddings) * self.item_nbytes

    @property
    def kv_token_nbytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.item_nbytes


@cache
def _known() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(files("dsplan").joinpath("data/models.json").read_text())[
        "models"
    ]
    return models


def known_models() -> tuple[str, ...]:
    """Names of the models that need no file."""
    return tuple(_known())


def find_model(name: str) -> ModelShape:
    """The shape of a known model (any case), of one in this host's store, or of the ``config.json`` at a path or in
    a directory.

    Raises :class:`PlanInput` where there is neither, or where the file says nothing usable.
    """
    for known, config in _known().items():
        if known.lower() == name.lower().rpartition("/")[2]:
            return shape_of(known, config)
    stored = home(os.environ) / "models" / name
    found = stored if stored.is_dir() else Path(name)
    path = found / "config.json" if found.is_dir() else found
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanInput(
            f"model {name}: neither a known name nor a readable Hugging Face config.json ({why})",
            remedy=f"name a config.json, its directory, or one of {', '.join(known_models())}",
        ) from error
    return shape_of(path.parent.name or name, config)


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config describes. Raises :class:`PlanInput` naming the key that is wrong."""
    if not isinstance(config, Mapping):
        raise PlanInput(f"model {name}: the config is a {type(config).__name__}, not a JSON object")
    config = {**config, **(config.get("text_config") or {})}
    hidden = _count(name, config, "hidden_size", "n_embd", "n_embed", "d_model")
    heads = _count(name, config, "num_attention_heads", "n_head", "n_heads")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    ungated = config.get("model_type") in UNGATED
    shared = config.get("multi_query") and not config.get("new_decoder_architecture")
    if config.get("kv_lora_rank"):
        raise PlanInput(
            f"model {name}: multi-head latent attention is not modelled",
            remedy="plan with a model of grouped-query attention of about that size",
        )
    if config.get("quantization_config"):
        raise PlanInput(
            f"model {name}: its weights are quantised, which is not modelled",
            remedy="plan with the config of the model in 16 bits",
        )
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=_count(name, config, "num_hidden_layers", "n_layer", "n_layers"),
        heads=heads,
        kv_heads=1 if shared else _count(name, config, "num_key_value_heads", "num_kv_heads", default=heads),
        head_dim=_count(name, config, "head_dim", default=max(hidden // heads, 1)),
        intermediate=_count(name, config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        vocab=_count(name, config, "vocab_size"),
        gated=not ungated,
        tied=bool(config.get("tie_word_embeddings", ungated)),
        item_nbytes=ITEM_NBYTES.get(stored, 2),
        head_norms=config.get("model_type") in HEAD_NORMED,
        **_experts(name, config),
        **_window(name, config),
    )


def _window(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding attention, by the names of Mistral, Qwen and Gemma."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return {}
    layers, window = _count(name, config, "num_hidden_layers", "n_layer"), _count(name, config, "sliding_window")
    if types := config.get("layer_types"):
        share = sum(one == "sliding_attention" for one in types) / len(types)
    elif every := config.get("sliding_window_pattern") or (2 if config.get("model_type") == "gemma2" else 0):
        # one in so many looks back all the way
        share = 1 - 1 / every
    else:
        share = 1 - min(int(config.get("max_window_layers") or 0), layers) / layers
    return {"window": window, "windowed": share}


def _experts(name: str, config: Mapping[str, Any]) -> dict[str, int]:
    """What makes a mixture of experts, by the names of Mixtral, Qwen and their kin; nothing for dense models."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    if not any(config.get(key) for key in keys):
        return {}
    layers = _count(name, config, "num_hidden_layers", "n_layer")
    width = _count(name, config, "moe_intermediate_size", "intermediate_size")
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width
    every = int(config.get("decoder_sparse_step") or 1)
    dense = {int(one) for one in config.get("mlp_only_layers") or ()}
    dense |= set(range(int(config.get("first_k_dense_replace") or 0)))
    dense |= {layer for layer in range(layers) if (layer + 1) % every}
    found = {
        "experts": _count(name, config, *keys),
        "active": _count(name, config, "num_experts_per_tok", "num_experts_per_token"),
    }
    if found["active"] > found["experts"]:
        raise PlanInput(f"model {name}: {found['active']} active experts of {found['experts']}")
    return found | {"expert_width": width, "shared_width": int(shared), "dense_layers": len(dense)}


def _count(name: str, config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= ABSURD:
        raise PlanInput(
            f"model {name}: {keys[0]} is {value!r}, not a whole number from 1 to {ABSURD}",
            remedy=f"give the config.json of a decoder model, with the key {keys[0]}",
        )
    return value
