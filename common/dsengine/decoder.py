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
from dsengine.parallel import Peers
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
        #: in the pool, which has the layers of the stage only
        self._index = index - parts.layers.start
        self._rule = plan.rule
        self._table = table
        self._heads, self._kv_heads, self._head_dim = parts.heads, parts.kv_heads, arch.head_dim
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
    the other, or (parallel) from the same ``x``. What comes out of ``f`` is a sum over the places of the stage.
    """

    def __init__(self, parts: Parts, index: int, plan: LayerPlan, table: RopeTable | None, peers: Peers) -> None:
        arch, names, prefix = parts.arch, parts.arch.names, parts.layer(index)

        def norm(name: str) -> AnyNorm | None:
            return parts.norm(name and prefix + name, arch.hidden_size)

        self._attention = SelfAttention(parts, index, plan, table)
        self._mlp = parts.mlp(prefix, plan.sparse)
        self._attention_before, self._mlp_before = norm(names.attention_before), norm(names.mlp_before)
        self._attention_after, self._mlp_after = norm(names.attention_after), norm(names.mlp_after)
        self._attention_outer, self._mlp_outer = norm(names.attention_outer), norm(names.mlp_outer)
        self._parallel = arch.parallel
        self._peers = peers

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``."""
        attended = self._peers.add(self._attention(_normed(self._attention_before, x), step))
        between = _normed(self._attention_outer, x + _normed(self._attention_after, attended))
        fed = self._peers.add(self._mlp(_normed(self._mlp_before, x if self._parallel else between)))
        return _normed(self._mlp_outer, between + _normed(self._mlp_after, fed))


class _Entry:
    """Tokens to hidden states, in the first stage."""

    def __init__(self, parts: Parts, embedding: Tensor, peers: Peers) -> None:
        arch = parts.arch
        self._embedding = embedding
        self._vocabulary = parts.vocabulary
        self._shared = parts.part.tp > 1
        self._positions = parts.positions()
        self._project = parts.projection(arch.names.project_in, arch.hidden_size, arch.embedding_size)
        # As in transformers, the scale is rounded to the dtype of the weights before it is used.
        self._scale = torch.tensor(arch.embedding_scale, dtype=embedding.dtype).item()
        self._peers = peers

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``[n]``, ``[n] -> [n, hidden_size]``."""
        hidden = self._embed(tokens)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        if self._project is not None:
            hidden = self._project(hidden)
        return hidden if self._positions is None else hidden + self._positions[positions]

    def _embed(self, tokens: Tensor) -> Tensor:
        if not self._shared:
            return functional.embedding(tokens, self._embedding)
        own = tokens - self._vocabulary.start
        elsewhere = (own < 0) | (own >= len(self._embedding))
        rows = functional.embedding(own.masked_fill(elsewhere, 0), self._embedding)
        return self._peers.add(rows.masked_fill(elsewhere[:, None], 0))


class _Exit:
    """Hidden states to logits, in the last stage."""

    def __init__(self, parts: Parts, embedding: Tensor | None, peers: Peers) -> None:
        arch = parts.arch
        self._norm = parts.norm(arch.names.final_norm, arch.hidden_size)
        self._project = parts.projection(arch.names.project_out, arch.embedding_size, arch.hidden_size)
        self._head = parts.head(embedding)
        self._softcap = arch.logit_softcap
        self._widths = tuple(piece.stop - piece.start for piece in parts.part.pieces(arch.vocab_size))
        self._peers = peers

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """``[n, hidden_size] -> [n, vocab_size]`` float32, at the first place; None at the others."""
        hidden = _normed(self._norm, hidden)
        if self._project is not None:
            hidden = self._project(hidden)
        logits = self._peers.gather(self._head(hidden).float(), self._widths)
        if logits is None or self._softcap is None:
            return logits
        return self._softcap * torch.tanh(logits / self._softcap)


class Decoder:
    """One replica, or one rank's part of one, on one device."""

    def __init__(self, parts: Parts, make_table: MakeTable, peers: Peers) -> None:
        """Take every tensor of the part from ``parts``. Raises :class:`~dswire.errors.UnsupportedModel`."""
        arch, part = parts.arch, parts.part
        plans = [(index, arch.plan[index]) for index in parts.layers]
        self._tables = {plan.rope: make_table(plan.rope) for _, plan in plans if plan.rope is not None}
        embedding = parts.embedding() if part.first or (part.last and arch.tied) else None
        self._entry = _Entry(parts, embedding, peers) if part.first and embedding is not None else None
        self._layers = [
            Layer(parts, index, plan, None if plan.rope is None else self._tables[plan.rope], peers)
            for index, plan in plans
        ]
        self._exit = _Exit(parts, embedding if arch.tied else None, peers) if part.last else None
        self._hidden_size, self._dtype = arch.hidden_size, parts.checkpoint.dtype
        self._peers = peers
        parts.finish()

    def run(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor | None:
        """``tokens`` ``[n]`` at ``positions`` ``[n]`` -> logits ``[rows, vocab_size]`` float32; None: all rows.

        The result is None where the ranks of an instance do not have it: at all but the one that draws.
        """
        if self._entry is not None:
            hidden = self._entry(tokens, positions)
        else:
            hidden = self._peers.receive((len(tokens), self._hidden_size), self._dtype)
        step = Step(attention, {table: table.at(positions) for table in self._tables.values()})
        for layer in self._layers:
            hidden = layer(hidden, step)
        if self._exit is None:
            self._peers.send(hidden)
            return None
        return self._exit(hidden if rows is None else hidden[rows])


def _normed(norm: AnyNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
