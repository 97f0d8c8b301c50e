"""The decoder of every lean family: what an architecture describes, over a flat row of tokens.

The token dimension carries whole prompts one behind the other (prefill) or one token of each sequence (decode);
which of the two is known only to the :class:`~dsengine.attention.Attention` that comes with the step. Formulas as
in the families' code in transformers; Q, K and V in one product, gate and up in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dsengine.architecture import LayerPlan
from dsengine.attention import Attention
from dsengine.norm import AnyNorm
from dsengine.parts import Parts
from dsengine.rope import Angles, RopeTable
from dsengine.rope_settings import Rope

#: the table for a rope
MakeTable = Callable[[Rope], RopeTable]


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward pass share."""

    attention: Attention
    #: of each table that a layer uses
    angles: dict[RopeTable, Angles]


class SelfAttention:
    """Queries, keys and values of one layer."""

    def __init__(self, parts: Parts, index: int, plan: LayerPlan, table: RopeTable | None) -> None:
        arch, prefix = parts.arch, parts.layer(index)
        self._index = index
        self._rule = plan.rule
        self._table = table
        self._heads, self._kv_heads, self._head_dim = arch.heads, arch.kv_heads, arch.head_dim
        self._qkv = parts.qkv(prefix)
        self._out = parts.attention_out(prefix)
        names = arch.names
        self._q_norm = parts.norm(names.q_norm and prefix + names.q_norm, arch.head_dim)
        self._k_norm = parts.norm(names.k_norm and prefix + names.k_norm, arch.head_dim)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        qkv = self._qkv(x).view(len(x), -1, self._head_dim)
        qk, v = qkv.split_with_sizes((self._heads + self._kv_heads, self._kv_heads), 1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = qk.split_with_sizes((self._heads, self._kv_heads), 1)
            qk = torch.cat((self._q_norm(q), self._k_norm(k)), 1)
        if self._table is not None:
            qk = self._table.rotate(qk, step.angles[self._table])
        q, k = qk.split_with_sizes((self._heads, self._kv_heads), 1)
        mixed = step.attention(self._index, q, torch.cat((k, v), 1), self._rule)
        return self._out(mixed.reshape(len(x), -1))


class Layer:
    """Attention and MLP around the residual.

    A branch is ``outer(x + after(f(before(x))))``, each norm only where the family has it; both branches one after
    the other, or (parallel) from the same ``x``.
    """

    def __init__(self, parts: Parts, index: int, plan: LayerPlan, table: RopeTable | None) -> None:
        arch, names, prefix = parts.arch, parts.arch.names, parts.layer(index)

        def norm(name: str) -> AnyNorm | None:
            return parts.norm(name and prefix + name, arch.hidden_size)

        self._attention = SelfAttention(parts, index, plan, table)
        self._mlp = parts.mlp(prefix, plan.sparse)
        self._attention_before, self._mlp_before = norm(names.attention_before), norm(names.mlp_before)
        self._attention_after, self._mlp_after = norm(names.attention_after), norm(names.mlp_after)
        self._attention_outer, self._mlp_outer = norm(names.attention_outer), norm(names.mlp_outer)
        self._parallel = arch.parallel

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        attended = self._attention(_normed(self._attention_before, x), step)
        between = _normed(self._attention_outer, x + _normed(self._attention_after, attended))
        fed = self._mlp(_normed(self._mlp_before, x if self._parallel else between))
        return _normed(self._mlp_outer, between + _normed(self._mlp_after, fed))


class Decoder:
    """One replica on one device."""

    def __init__(self, parts: Parts, make_table: MakeTable) -> None:
        """Take every tensor from ``parts``. Raises :class:`~dswire.errors.UnsupportedModel`."""
        arch, names = parts.arch, parts.arch.names
        self.arch = arch
        self._tables = {plan.rope: make_table(plan.rope) for plan in arch.plan if plan.rope is not None}
        self._embedding = parts.embedding()
        self._positions = parts.positions()
        self._project_in = parts.projection(names.project_in, arch.hidden_size, arch.embedding_size)
        self._layers = [
            Layer(parts, index, plan, None if plan.rope is None else self._tables[plan.rope])
            for index, plan in enumerate(arch.plan)
        ]
        self._norm = parts.norm(names.final_norm, arch.hidden_size)
        self._project_out = parts.projection(names.project_out, arch.embedding_size, arch.hidden_size)
        self._head = parts.head(self._embedding)
        # As in transformers, the scale is rounded to the dtype of the weights before it is used.
        self._scale = torch.tensor(arch.embedding_scale, dtype=self._embedding.dtype).item()
        parts.checkpoint.finish()

    def run(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> logits ``[rows, vocab_size]`` float32; None: all rows."""
        hidden = self.forward(tokens, positions, attention)
        return self.logits(hidden if rows is None else hidden[rows])

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> hidden states ``[n, hidden_size]`` for :meth:`logits`."""
        hidden = functional.embedding(tokens, self._embedding)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if self._positions is not None:
            hidden = hidden + self._positions[positions]
        step = Step(attention, {table: table.at(positions) for table in self._tables.values()})
        for layer in self._layers:
            hidden = layer(hidden, step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden_size] -> [n, vocab_size]`` float32."""
        hidden = _normed(self._norm, hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        logits = self._head(hidden).float()
        softcap = self.arch.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _normed(norm: AnyNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
