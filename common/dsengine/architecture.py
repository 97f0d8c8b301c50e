"""The architecture of a model: what the decoder has to know of it, and nothing of how its files say so.

Invariant: every :class:`Architecture` is one that :mod:`dsengine.decoder` computes exactly; which configurations
lead to one is told in :mod:`dsengine.families`. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsengine.rope_settings import Rope

#: functions of one number that an MLP may use, by their names in configurations
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"]


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How the heads of a layer attend, apart from causality."""

    #: factor of the product of query and key; None for ``1 / sqrt(head_dim)``
    scale: float | None = None
    #: tokens that a query sees, itself included; None for all before it
    window: int | None = None
    #: scores become ``softcap * tanh(scores / softcap)``
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """In what one layer may differ from another."""

    rule: AttentionRule
    #: None: the layer's queries and keys carry no position of their own
    rope: Rope | None
    #: the MLP is a mixture of experts
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalisation over the hidden dimension."""

    #: ``rms_plus_one``: the factor is one more than the stored weight, and is applied in float32
    kind: Literal["rms", "rms_plus_one", "layer"]
    eps: float
    #: weights (and a layer norm's biases) are stored
    affine: bool = True


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward part."""

    #: width of its inner dimension
    size: int
    activation: Activation
    #: ``down(act(gate(x)) * up(x))``; else ``down(act(up(x)))``
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in the place of an MLP; experts use the model's activation, gated, without bias."""

    count: int
    #: experts that a token goes to
    per_token: int
    #: width of an expert's inner dimension
    size: int
    #: the weights of a token's experts add up to one
    renormalise: bool
    #: width of the expert that every token goes to, behind a gate of its own; 0 for none
    shared_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Tensor names without ``.weight`` and ``.bias``; the defaults are those of Llama. Empty: there is none."""

    #: before everything but the head; checkpoints of the bare model lack its first word
    root: str = "model."
    embedding: str = "embed_tokens"
    positions: str = ""
    #: from and to the embedding's width
    project_in: str = ""
    project_out: str = ""
    layer: str = "layers.{}."
    #: Q, K and V, or one tensor with the rows of all three
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = ""
    k_norm: str = ""
    attention_out: str = "self_attn.o_proj"
    #: gate and up, or one tensor with the rows of both; only up where the MLP is not gated
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    #: norms of the branch's input; of its output; of the sum of residual and output
    attention_before: str = "input_layernorm"
    attention_after: str = ""
    attention_outer: str = ""
    mlp_before: str = "post_attention_layernorm"
    mlp_after: str = ""
    mlp_outer: str = ""
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_in: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_out: str = "down_proj"
    shared: str = "mlp.shared_expert."
    shared_gate: str = "mlp.shared_expert_gate"
    final_norm: str = "norm"
    head: str = "lm_head"
    #: full names in a layer that old checkpoints carry along and that follow from the configuration
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Shapes and switches of a decoder."""

    #: value of ``architectures`` in the configuration
    name: str
    vocab_size: int
    hidden_size: int
    #: width of the token embedding; projected where it differs from ``hidden_size``
    embedding_size: int
    layers: int
    heads: int
    #: divides ``heads``
    kv_heads: int
    head_dim: int
    #: positions that the model knows
    max_positions: int
    eos_ids: frozenset[int]
    norm: Norm
    mlp: Mlp
    #: one for each layer
    plan: tuple[LayerPlan, ...]
    experts: Experts | None = None
    #: the output head is the embedding
    tied: bool = False
    #: what embeddings are multiplied by
    embedding_scale: float = 1.0
    #: rows of the table of learned positions before that of position 0; None: no such table
    position_offset: int | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    #: the rows of the one QKV tensor go by head: Q, K and V of the first, of the second...
    qkv_by_head: bool = False
    #: matrices are stored ``[in, out]``
    transposed: bool = False
    #: attention and MLP of a layer see the same input
    parallel: bool = False
    #: logits become ``softcap * tanh(logits / softcap)``
    logit_softcap: float | None = None
    names: Names = Names()
