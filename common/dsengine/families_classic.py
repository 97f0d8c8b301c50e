"""Families from before Llama: layer norms with biases, plain MLPs, positions learned or partly rotary.

No torch here.
"""

from __future__ import annotations

from dataclasses import replace

from dsengine.architecture import Architecture, AttentionRule, LayerPlan, Mlp, Names, Norm
from dsengine.config_json import ConfigFile
from dsengine.family_parts import activation, alike, llama_like
from dsengine.rope_settings import read_rope
from dswire.errors import UnsupportedModel


def opt(config: ConfigFile) -> Architecture:
    hidden, heads = config.need("hidden_size", int), config.need("num_attention_heads", int)
    bias, before = config.flag("enable_bias", True), config.flag("do_layer_norm_before", True)
    width = config.integer("word_embed_proj_dim", hidden)
    final = before and not config.flag("_remove_final_layer_norm", False)
    return replace(
        _plain(config, hidden, heads, config.need("num_hidden_layers", int)),
        embedding_size=width,
        max_positions=config.integer("max_position_embeddings", 2048),
        norm=Norm("layer", 1e-5, affine=config.flag("layer_norm_elementwise_affine", True)),
        mlp=Mlp(
            config.need("ffn_dim", int), activation(config, "activation_function", "relu"), gated=False, bias=bias
        ),
        tied=config.flag("tie_word_embeddings", True),
        position_offset=2,
        qkv_bias=bias,
        attention_out_bias=bias,
        names=Names(
            root="model.decoder.",
            positions="embed_positions",
            project_in="project_in" if width != hidden else "",
            project_out="project_out" if width != hidden else "",
            attention_out="self_attn.out_proj",
            mlp_in=("fc1",),
            mlp_out="fc2",
            final_norm="final_layer_norm" if final else "",
            attention_before="self_attn_layer_norm" if before else "",
            attention_outer="" if before else "self_attn_layer_norm",
            mlp_before="final_layer_norm" if before else "",
            mlp_outer="" if before else "final_layer_norm",
        ),
    )


def gpt2(config: ConfigFile) -> Architecture:
    hidden, heads, layers = (config.need(key, int) for key in ("n_embd", "n_head", "n_layer"))
    if config.flag("add_cross_attention", False):
        raise UnsupportedModel(f"{config.path}: not supported: add_cross_attention")
    arch = replace(
        _plain(config, hidden, heads, layers),
        max_positions=config.need("n_positions", int),
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5)),
        mlp=Mlp(
            config.integer("n_inner", 4 * hidden),
            activation(config, "activation_function", "gelu_new"),
            gated=False,
            bias=True,
        ),
        tied=config.flag("tie_word_embeddings", True),
        position_offset=0,
        qkv_bias=True,
        attention_out_bias=True,
        transposed=True,
        names=_GPT2_NAMES,
    )
    base = (hidden // heads) ** -0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_depth = config.flag("scale_attn_by_inverse_layer_idx", False)
    scales = [base / (i + 1) if by_depth else base for i in range(layers)]
    return replace(arch, plan=tuple(LayerPlan(AttentionRule(scale=scale), None) for scale in scales))


_GPT2_NAMES = Names(
    root="transformer.",
    embedding="wte",
    positions="wpe",
    layer="h.{}.",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    attention_before="ln_1",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    mlp_before="ln_2",
    final_norm="ln_f",
    ignored=("attn.bias", "attn.masked_bias"),
)


def gpt_neox(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    bias = config.flag("attention_bias", True)
    fraction = config.number("rotary_pct", 0.25)
    rope = read_rope(config, theta=config.number("rotary_emb_base", 10000.0), fraction=fraction)
    return replace(
        arch,
        norm=Norm("layer", config.number("layer_norm_eps", 1e-5)),
        mlp=Mlp(arch.mlp.size, activation(config, "hidden_act", "gelu"), gated=False, bias=True),
        plan=alike(arch.layers, AttentionRule(), rope),
        qkv_bias=bias,
        attention_out_bias=bias,
        qkv_by_head=True,
        parallel=config.flag("use_parallel_residual", True),
        names=_NEOX_NAMES,
    )


_NEOX_NAMES = Names(
    root="gpt_neox.",
    embedding="embed_in",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="final_layer_norm",
    head="embed_out",
    ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)


def _plain(config: ConfigFile, hidden: int, heads: int, layers: int) -> Architecture:
    """Multi-head attention without rotation, one head of Q for each of K and V."""
    if hidden % heads:
        raise UnsupportedModel(f"{config.path}: not supported: hidden size {hidden} over {heads} heads")
    return Architecture(
        name=config.architecture,
        vocab_size=config.need("vocab_size", int),
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=0,
        eos_ids=config.eos_ids(),
        norm=Norm("layer", 1e-5),
        mlp=Mlp(4 * hidden, "gelu"),
        plan=alike(layers, AttentionRule(), None),
    )
