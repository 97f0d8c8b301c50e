"""Small random models of every family, made by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from support.tiny_llama import VOCAB

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 48,
}
_LLAMA = _COMMON | {"intermediate_size": 80, "num_key_value_heads": 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 4.0],
    "original_max_position_embeddings": 32,
}
_OPT: dict[str, Any] = {key: value for key, value in _COMMON.items() if key != "initializer_range"} | {
    "ffn_dim": 80,
    "word_embed_proj_dim": 48,
    "init_std": 0.3,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = _LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
#: small caps and windows, so that they matter for short prompts of a small model
_GEMMA = _LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 20, "initializer_range": 0.2}
_DUAL_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
}

#: name -> how to make its configuration, and with what
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama with yarn": (LlamaConfig, _LLAMA | {"rope_parameters": _YARN}),
    "mistral": (MistralConfig, _LLAMA | {"sliding_window": 20, "head_dim": 12}),
    "mistral without window": (MistralConfig, _LLAMA | {"sliding_window": None}),
    "smollm3": (SmolLM3Config, _LLAMA | {"no_rope_layer_interval": 2, "attention_bias": True}),
    "smollm3 with window": (
        SmolLM3Config,
        _LLAMA | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 20},
    ),
    "qwen2": (Qwen2Config, _LLAMA),
    "qwen2 with window": (
        Qwen2Config,
        _LLAMA | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, _LLAMA | {"head_dim": 12, "attention_bias": True}),
    "gemma": (GemmaConfig, _LLAMA | {"head_dim": 12}),
    "gemma2": (Gemma2Config, _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2 without caps": (
        Gemma2Config,
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (Gemma3TextConfig, _GEMMA | {"sliding_window_pattern": 3, "rope_parameters": _DUAL_ROPE}),
    "phi3": (Phi3Config, _LLAMA | {"sliding_window": 20}),
    "phi3 with longrope": (Phi3Config, _LLAMA | {"rope_parameters": _LONGROPE}),
    "opt": (OPTConfig, _OPT),
    "opt with norms behind": (OPTConfig, _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt without biases": (OPTConfig, _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gpt2": (GPT2Config, _GPT2),
    "gpt2 scaled by depth": (
        GPT2Config,
        _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_inner": 80},
    ),
    "gpt-neox": (GPTNeoXConfig, _COMMON | {"intermediate_size": 80, "rotary_pct": 0.5}),
    "gpt-neox in sequence": (
        GPTNeoXConfig,
        _COMMON | {"intermediate_size": 80, "use_parallel_residual": False, "attention_bias": False},
    ),
    "mixtral": (MixtralConfig, _LLAMA | {"num_local_experts": 5, "sliding_window": 20}),
    "qwen2-moe": (
        Qwen2MoeConfig,
        _MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "use_sliding_window": False},
    ),
    "qwen3-moe": (Qwen3MoeConfig, _MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
}


def make_family(path: Path, name: str, **changes: Any) -> Path:
    """Save a random model of family ``name``; returns ``path``."""
    make_config, settings = FAMILIES[name]
    return save_random(path, make_config(**settings | changes))


def save_random(path: Path, config: Any) -> Path:
    """Save a model with weights large enough that logits differ well, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # zeros and ones by default, which would hide one that is not used
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif "embed_positions" in parameter_name or "wpe" in parameter_name:
                parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return path
