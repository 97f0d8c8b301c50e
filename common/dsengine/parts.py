"""The parts of a decoder made from the tensors of a checkpoint.

Here, and nowhere else, an :class:`~dsengine.architecture.Architecture` meets the names, shapes and layouts in which
its family stores weights. Each method raises :class:`~dswire.errors.UnsupportedModel` for a tensor that is missing
or has another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dsengine.architecture import Architecture
from dsengine.linear import AnyLinear, Linear
from dsengine.mlp import AnyMlp, GatedMlp, MixtureOfExperts, Mlp, SharedExpert
from dsengine.norm import AnyNorm, LayerNorm, RmsNorm, RmsNormPlusOne
from dsengine.weights import Checkpoint

#: makes a matrix of weights ready for use: ``(weight, bias) -> linear``
MakeLinear = Callable[[Tensor, Tensor | None], AnyLinear]


class Parts:
    """Takes tensors out of ``checkpoint``."""

    def __init__(self, arch: Architecture, checkpoint: Checkpoint, make_linear: MakeLinear = Linear) -> None:
        self.arch = arch
        self.checkpoint = checkpoint
        self.root = checkpoint.root_of(arch.names.root, arch.names.embedding)
        self._make = make_linear

    def embedding(self) -> Tensor:
        """``[vocab_size, embedding_size]``."""
        return self._take(self.arch.names.embedding, (self.arch.vocab_size, self.arch.embedding_size))

    def positions(self) -> Tensor | None:
        """``[max_positions, hidden_size]``, where positions are learned."""
        arch = self.arch
        if arch.position_offset is None:
            return None
        rows = arch.max_positions + arch.position_offset
        return self._take(arch.names.positions, (rows, arch.hidden_size))[arch.position_offset :]

    def projection(self, name: str, rows: int, columns: int) -> AnyLinear | None:
        """A matrix before or behind the layers."""
        return self._linear([self.root + name], [rows], columns, bias=False) if name else None

    def head(self, embedding: Tensor) -> AnyLinear:
        """Hidden states to logits."""
        name = self.arch.names.head + ".weight"
        if self.arch.tied:
            self.checkpoint.skip(name)
            return self._make(embedding, None)
        return self._make(self.checkpoint.take(name, (self.arch.vocab_size, self.arch.embedding_size)), None)

    def norm(self, name: str, size: int) -> AnyNorm | None:
        """The norm ``name`` over ``size`` elements; None for a name that is empty."""
        kind = self.arch.norm
        if not name:
            return None
        if kind.kind == "layer":
            weight, bias = (
                self._take(name, (size,), what) if kind.affine else None for what in (".weight", ".bias")
            )
            return LayerNorm(size, weight, bias, kind.eps)
        made = RmsNorm if kind.kind == "rms" else RmsNormPlusOne
        return made(self._take(name, (size,)), kind.eps)

    def layer(self, index: int) -> str:
        """What the names of layer ``index`` begin with; lets go of what needs no taking."""
        prefix = self.arch.names.layer.format(index)
        for name in self.arch.names.ignored:
            self.checkpoint.skip(self.root + prefix + name)
        return prefix

    def qkv(self, layer: str) -> AnyLinear:
        """Rows: Q heads, K heads, V heads."""
        arch = self.arch
        q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        rows = [q, kv, kv] if len(arch.names.qkv) > 1 else [q + 2 * kv]
        names = [self.root + layer + name for name in arch.names.qkv]
        return self._linear(names, rows, arch.hidden_size, arch.qkv_bias, by_head=arch.qkv_by_head)

    def attention_out(self, layer: str) -> AnyLinear:
        """Heads to hidden."""
        arch = self.arch
        name = self.root + layer + arch.names.attention_out
        return self._linear([name], [arch.hidden_size], arch.heads * arch.head_dim, arch.attention_out_bias)

    def mlp(self, layer: str, sparse: bool) -> AnyMlp:
        """The feed-forward part of a layer."""
        arch, names = self.arch, self.arch.names
        if sparse:
            return self._experts(self.root + layer)
        prefix = self.root + layer
        if arch.mlp.gated:
            return self._gated(prefix, names.mlp_in, names.mlp_out, arch.mlp.size, arch.mlp.bias)
        up = self._linear([prefix + names.mlp_in[0]], [arch.mlp.size], arch.hidden_size, arch.mlp.bias)
        down = self._linear([prefix + names.mlp_out], [arch.hidden_size], arch.mlp.size, arch.mlp.bias)
        return Mlp(up, down, arch.mlp.activation)

    def _experts(self, prefix: str) -> MixtureOfExperts:
        arch, names, experts = self.arch, self.arch.names, self.arch.experts
        assert experts is not None  # a plan with sparse layers comes with experts
        # The router stays exact: which experts a token meets must not hang on a rounding of its weights.
        router = self.checkpoint.take(prefix + names.router + ".weight", (experts.count, arch.hidden_size))
        each = [
            self._gated(prefix + names.expert.format(number), names.expert_in, names.expert_out, experts.size)
            for number in range(experts.count)
        ]
        shared = None
        if experts.shared_size:
            gate = self.checkpoint.take(prefix + names.shared_gate + ".weight", (1, arch.hidden_size))
            mlp = self._gated(prefix + names.shared, names.expert_in, names.expert_out, experts.shared_size)
            shared = SharedExpert(Linear(gate), mlp)
        return MixtureOfExperts(Linear(router), each, experts.per_token, experts.renormalise, shared)

    def _gated(
        self, prefix: str, names_in: Sequence[str], name_out: str, size: int, bias: bool = False
    ) -> GatedMlp:
        hidden = self.arch.hidden_size
        rows = [size, size] if len(names_in) > 1 else [2 * size]
        gate_up = self._linear([prefix + name for name in names_in], rows, hidden, bias)
        down = self._linear([prefix + name_out], [hidden], size, bias)
        return GatedMlp(gate_up, down, self.arch.mlp.activation)

    def _linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool, *, by_head: bool = False
    ) -> AnyLinear:
        weight = self._rows([f"{name}.weight" for name in names], rows, columns)
        offset = self._rows([f"{name}.bias" for name in names], rows) if bias else None
        if by_head:
            weight = self._sorted_by_kind(weight)
            offset = None if offset is None else self._sorted_by_kind(offset)
        return self._make(weight, offset)

    def _rows(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> Tensor:
        if self.arch.transposed and columns:
            return self.checkpoint.take(names[0], (*columns, rows[0])).t().contiguous()
        return self.checkpoint.take_rows(names, rows, *columns)

    def _sorted_by_kind(self, rows: Tensor) -> Tensor:
        """Rows that go by head (Q, K, V of the first...) brought into the order Q heads, K heads, V heads."""
        parted = rows.view(self.arch.heads, 3, self.arch.head_dim, *rows.shape[1:])
        return parted.transpose(0, 1).reshape(rows.shape)

    def _take(self, name: str, shape: Sequence[int], what: str = ".weight") -> Tensor:
        return self.checkpoint.take(self.root + name + what, shape)
