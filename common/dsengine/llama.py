"""The Llama decoder: weights by their names in a checkpoint, and the forward pass over a flat row of tokens.

The token dimension carries whole prompts one behind the other (prefill) or one token of each sequence (decode);
which of the two is known only to the :class:`~dsengine.attention.Attention` that comes with the step. Formulas as
in transformers' ``LlamaForCausalLM``, Q, K and V in one product, gate and up in another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dsengine.architecture import Architecture
from dsengine.attention import Attention
from dsengine.linear import Linear
from dsengine.rope import RopeTable
from dsengine.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    #: rows: Q heads, K heads, V heads
    qkv: Linear
    attention_out: Linear
    mlp_norm: Tensor
    #: rows: gate, up
    gate_up: Linear
    down: Linear


class Llama:
    """One replica on one device."""

    def __init__(self, arch: Architecture, checkpoint: Checkpoint, rope: RopeTable) -> None:
        """Take every tensor from ``checkpoint``. Raises :class:`~dswire.errors.UnsupportedModel`."""
        self.arch = arch
        self._rope = rope
        self._embedding = checkpoint.take("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size))
        self._layers = [_load_layer(arch, checkpoint, f"model.layers.{i}") for i in range(arch.layers)]
        self._norm = checkpoint.take("model.norm.weight", (arch.hidden_size,))
        self._head = Linear(self._load_head(checkpoint))
        checkpoint.finish()

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> hidden states ``[n, hidden_size]`` for :meth:`logits`."""
        arch = self.arch
        angles = self._rope.at(positions)
        hidden = functional.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, arch.norm_eps)
            qkv = layer.qkv(normed).view(len(tokens), -1, arch.head_dim)
            qk, v = qkv.split_with_sizes((arch.heads + arch.kv_heads, arch.kv_heads), 1)
            q, k = self._rope.rotate(qk, angles).split_with_sizes((arch.heads, arch.kv_heads), 1)
            mixed = attention(index, q, torch.cat((k, v), 1))
            hidden = hidden + layer.attention_out(mixed.reshape(len(tokens), -1))
            gate, up = layer.gate_up(rms_norm(hidden, layer.mlp_norm, arch.norm_eps)).chunk(2, -1)
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden_size] -> [n, vocab_size]`` float32."""
        return self._head(rms_norm(hidden, self._norm, self.arch.norm_eps)).float()

    def _load_head(self, checkpoint: Checkpoint) -> Tensor:
        if self.arch.tied:
            checkpoint.skip("lm_head.weight")
            return self._embedding
        return checkpoint.take("lm_head.weight", (self.arch.vocab_size, self.arch.hidden_size))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv 1910.07467) over the last dimension, computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def _load_layer(arch: Architecture, checkpoint: Checkpoint, prefix: str) -> _Layer:
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    checkpoint.skip(f"{prefix}.self_attn.rotary_emb.inv_freq")  # in old checkpoints; follows from the configuration
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def linear(names: list[str], rows: list[int], columns: int, bias: bool) -> Linear:
        weight = checkpoint.take_rows([f"{name}.weight" for name in names], rows, columns)
        return Linear(weight, checkpoint.take_rows([f"{name}.bias" for name in names], rows) if bias else None)

    return _Layer(
        attention_norm=checkpoint.take(f"{prefix}.input_layernorm.weight", (arch.hidden_size,)),
        qkv=linear(
            [f"{attention}.{name}_proj" for name in "qkv"], [q, kv, kv], arch.hidden_size, arch.attention_bias
        ),
        attention_out=linear([f"{attention}.o_proj"], [arch.hidden_size], q, arch.attention_bias),
        mlp_norm=checkpoint.take(f"{prefix}.post_attention_layernorm.weight", (arch.hidden_size,)),
        gate_up=linear(
            [f"{mlp}.gate_proj", f"{mlp}.up_proj"], [arch.mlp_size] * 2, arch.hidden_size, arch.mlp_bias
        ),
        down=linear([f"{mlp}.down_proj"], [arch.hidden_size], arch.mlp_size, arch.mlp_bias),
    )
