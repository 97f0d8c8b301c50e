"""What several model families describe alike: Llama as the base, activations, which layers slide, experts.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsengine.architecture import Activation, Architecture, AttentionRule, Experts, LayerPlan, Mlp, Norm
from dsengine.config_json import ConfigFile
from dsengine.rope_settings import Rope, parse_rope, read_rope
from dswire.errors import UnsupportedModel

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}


def llama_like(config: ConfigFile, *, theta: float = 10000.0, window: int | None = None) -> Architecture:
    """Llama; ``window`` for all layers, ``theta`` where the file has none."""
    heads = config.need("num_attention_heads", int)
    kv_heads = config.integer("num_key_value_heads", heads)
    hidden = config.need("hidden_size", int)
    head_dim = config.integer("head_dim", hidden // heads)
    layers = config.need("num_hidden_layers", int)
    if heads % kv_heads:
        raise UnsupportedModel(f"{config.path}: not supported: {kv_heads} KV heads for {heads} heads")
    if config.get("head_dim", int) is None and hidden % heads:
        raise UnsupportedModel(f"{config.path}: not supported: hidden_size {hidden} over {heads} heads")
    bias = config.flag("attention_bias", False)
    return Architecture(
        name=config.architecture,
        vocab_size=config.need("vocab_size", int),
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=config.integer("max_position_embeddings", 2048),
        eos_ids=config.eos_ids(),
        norm=Norm("rms", config.number("rms_norm_eps", 1e-6)),
        mlp=Mlp(
            config.need("intermediate_size", int),
            activation(config, "hidden_act", "silu"),
            bias=config.flag("mlp_bias", False),
        ),
        plan=alike(layers, AttentionRule(window=window), read_rope(config, theta=theta)),
        tied=config.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        attention_out_bias=bias,
    )


def activation(config: ConfigFile, key: str, default: str) -> Activation:
    """The function named by ``key``."""
    name = config.text(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{config.path}: {key} {name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def alike(layers: int, rule: AttentionRule, rope: Rope | None) -> tuple[LayerPlan, ...]:
    """A plan in which every layer does the same."""
    return (LayerPlan(rule, rope),) * layers


def slides(config: ConfigFile, default: Sequence[bool]) -> list[bool]:
    """Which layers see a window only: ``layer_types`` where the file has it."""
    types = config.get("layer_types", list[str])
    if types is None:
        return list(default)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != len(default):
        what = f"layer type {min(unknown)!r}" if unknown else f"{len(types)} layer_types for {len(default)} layers"
        raise UnsupportedModel(f"{config.path}: not supported: {what}")
    return [kind == "sliding_attention" for kind in types]


def windowed(config: ConfigFile, plan: tuple[LayerPlan, ...], default: Sequence[bool]) -> tuple[LayerPlan, ...]:
    """Qwen's plan: with ``use_sliding_window``, a window on the layers of ``layer_types`` or ``default``."""
    window = config.nullable("sliding_window", 4096)
    if not config.flag("use_sliding_window", False) or window is None:
        return plan
    return tuple(
        replace(layer, rule=replace(layer.rule, window=window)) if slide else layer
        for layer, slide in zip(plan, slides(config, default), strict=True)
    )


def sparse(config: ConfigFile, plan: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    """Qwen's plan with experts in every layer, but for those that the file excepts."""
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers", list[int]) or []
    return tuple(replace(layer, sparse=i not in dense and (i + 1) % step == 0) for i, layer in enumerate(plan))


def qwen_experts(config: ConfigFile, shared_size: int) -> Experts:
    """Experts by Qwen's keys."""
    count = config.get("num_experts", int) or config.need("num_local_experts", int)
    return Experts(
        count=count,
        per_token=config.need("num_experts_per_tok", int),
        size=config.need("moe_intermediate_size", int),
        renormalise=config.flag("norm_topk_prob", False),
        shared_size=shared_size,
    )


def gemma_plan(
    config: ConfigFile, layers: int, softcap: float | None, every: int, *, dual: bool = False
) -> tuple[LayerPlan, ...]:
    """All but each ``every``-th layer slide; with ``dual``, those have a rope of their own."""
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5
    window = config.integer("sliding_window", 4096)
    full = local = read_rope(config, theta=1_000_000.0 if dual else 10000.0, of="full_attention")
    if dual:
        by_type = (config.get("rope_parameters", dict) or {}).get("sliding_attention", {})
        local = parse_rope(config, by_type, config.number("rope_local_base_freq", 10000.0))
    return tuple(
        LayerPlan(AttentionRule(scale, window if slide else None, softcap), local if slide else full)
        for slide in slides(config, [(i + 1) % every != 0 for i in range(layers)])
    )
