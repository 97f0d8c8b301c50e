"""The model families of the lean decoder: one description each, of where it departs from Llama.

Invariant: what :func:`load_architecture` returns is computed exactly as the family's own code in transformers does;
a feature for which that does not hold is refused with :class:`UnsupportedModel` that names it. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dsengine.architecture import Architecture, AttentionRule, Experts, LayerPlan, Names, Norm
from dsengine.config_json import ConfigFile
from dsengine.families_classic import gpt2, gpt_neox, opt
from dsengine.family_parts import (
    activation,
    gemma_plan,
    llama_like,
    qwen_experts,
    slides,
    sparse,
    windowed,
)
from dswire.errors import UnsupportedModel

_QK_NORM = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
#: keys under which quantisers describe what they did; GPTQ's first ones used a file of its own
_QUANTISED = ("quantization_config", "compression_config")
_SANDWICH = Names(
    attention_after="post_attention_layernorm",
    mlp_before="pre_feedforward_layernorm",
    mlp_after="post_feedforward_layernorm",
)


def load_architecture(model_dir: Path) -> Architecture:
    """The architecture of ``model_dir``.

    Raises :class:`~dswire.errors.ModelNotFound` where there is no readable configuration and
    :class:`UnsupportedModel` for families and features that the lean decoder lacks.
    """
    config = ConfigFile.load(model_dir)
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UnsupportedModel(
            f"{config.path}: architecture {config.architecture} is not supported",
            remedy=f"use a model of {', '.join(FAMILIES)}",
        )
    quantised = next((key for key in _QUANTISED if config.get(key, dict)), None)
    if quantised or (model_dir / "quantize_config.json").is_file():
        raise UnsupportedModel(
            f"{config.path}: not supported: quantised weights ({quantised or 'quantize_config.json'})",
            remedy="use the model's unquantised checkpoint",
        )
    return family(config)


def _llama(config: ConfigFile) -> Architecture:
    return llama_like(config)


def _mistral(config: ConfigFile) -> Architecture:
    return llama_like(config, window=config.nullable("sliding_window", 4096))


def _smollm3(config: ConfigFile) -> Architecture:
    arch = llama_like(config, theta=2_000_000.0)
    every = config.integer("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers", list[int]) or [(i + 1) % every for i in range(arch.layers)]
    window = config.get("sliding_window", int) if config.flag("use_sliding_window", False) else None
    plan = [
        LayerPlan(AttentionRule(window=window if slide else None), layer.rope if turn else None)
        for layer, turn, slide in zip(arch.plan, turned, slides(config, [not turn for turn in turned]), strict=True)
    ]
    return replace(arch, plan=tuple(plan), tied=config.flag("tie_word_embeddings", True))


def _qwen2(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    first = config.integer("max_window_layers", 28)
    plan = windowed(config, arch.plan, [i >= first for i in range(arch.layers)])
    return replace(arch, plan=plan, qkv_bias=True, attention_out_bias=False)


def _qwen3(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    first = config.integer("max_window_layers", 28)
    plan = windowed(config, arch.plan, [i >= first for i in range(arch.layers)])
    return replace(arch, plan=plan, names=_QK_NORM)


def _qwen2_moe(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    first = config.integer("max_window_layers", 28)
    plan = windowed(config, arch.plan, [i % 2 == 0 and i < first for i in range(arch.layers)])
    experts = qwen_experts(config, config.need("shared_expert_intermediate_size", int))
    bias = config.flag("qkv_bias", True)
    plan = sparse(config, plan)
    return replace(arch, plan=plan, experts=experts, qkv_bias=bias, attention_out_bias=False)


def _qwen3_moe(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    plan = windowed(config, arch.plan, [True] * arch.layers)
    return replace(arch, plan=sparse(config, plan), experts=qwen_experts(config, 0), names=_QK_NORM)


def _mixtral(config: ConfigFile) -> Architecture:
    arch = llama_like(config, theta=1_000_000.0, window=config.get("sliding_window", int))
    experts = Experts(
        count=config.integer("num_local_experts", 8),
        per_token=config.integer("num_experts_per_tok", 2),
        size=arch.mlp.size,
        renormalise=True,
    )
    names = Names(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_in=("w1", "w3"),
        expert_out="w2",
    )
    norm = Norm("rms", config.number("rms_norm_eps", 1e-5))
    plan = tuple(replace(layer, sparse=True) for layer in arch.plan)
    return replace(arch, plan=plan, experts=experts, names=names, norm=norm)


def _gemma(config: ConfigFile) -> Architecture:
    arch = llama_like(config)
    key = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    if config.get("use_bidirectional_attention", bool):
        raise UnsupportedModel(f"{config.path}: not supported: use_bidirectional_attention")
    return replace(
        arch,
        norm=Norm("rms_plus_one", arch.norm.eps),
        mlp=replace(arch.mlp, activation=activation(config, key, "gelu_pytorch_tanh")),
        tied=config.flag("tie_word_embeddings", True),
        embedding_scale=arch.hidden_size**0.5,
    )


def _gemma2(config: ConfigFile) -> Architecture:
    arch = _gemma(config)
    return replace(
        arch,
        plan=gemma_plan(config, arch.layers, config.nullable("attn_logit_softcapping", 50.0), every=2),
        logit_softcap=config.nullable("final_logit_softcapping", 30.0),
        names=_SANDWICH,
    )


def _gemma3(config: ConfigFile) -> Architecture:
    arch = _gemma(config)
    every = config.get("sliding_window_pattern", int) or config.integer("_sliding_window_pattern", 6)
    return replace(
        arch,
        plan=gemma_plan(config, arch.layers, config.get("attn_logit_softcapping", float), every, dual=True),
        logit_softcap=config.get("final_logit_softcapping", float),
        names=replace(_SANDWICH, q_norm=_QK_NORM.q_norm, k_norm=_QK_NORM.k_norm),
    )


def _phi3(config: ConfigFile) -> Architecture:
    arch = llama_like(config, window=config.get("sliding_window", int))
    norm = Norm("rms", config.number("rms_norm_eps", 1e-5))
    names = Names(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",))
    return replace(arch, norm=norm, names=names, qkv_bias=False, attention_out_bias=False)


#: value of ``architectures`` -> its description
FAMILIES: dict[str, Callable[[ConfigFile], Architecture]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "SmolLM3ForCausalLM": _smollm3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "OPTForCausalLM": opt,
    "GPT2LMHeadModel": gpt2,
    "GPTNeoXForCausalLM": gpt_neox,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
