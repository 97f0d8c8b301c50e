"""The parts of a decoder made from the tensors of a checkpoint.

Here, and nowhere else, an :class:`~dsengine.architecture.Architecture` meets the names, shapes and layouts in which
its family stores weights. Each method raises :class:`~dswire.errors.UnsupportedModel` for a tensor that is missing
or has another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from dsengine.architecture import Architecture
from dsengine.int8 import GROUP, peaks_of
from dsengine.linear import AnyLinear, Cut, Linear
from dsengine.mlp import AnyMlp, GatedMlp, MixtureOfExperts, Mlp, SharedExpert
from dsengine.norm import AnyNorm, LayerNorm, RmsNorm, RmsNormPlusOne
from dsengine.parallel import WHOLE, Part
from dsengine.weights import Checkpoint


class MakeLinear(Protocol):
    """Makes a matrix of weights ready for use; ``cut`` where only some of its columns are here."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> AnyLinear:
        """``weight`` ``[out, in]``, ``bias`` ``[out]``."""
        ...


_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A stored tensor's rows, and which of them are taken."""

    count: int
    taken: tuple[slice, ...]


class Parts:
    """Takes the tensors of ``part`` out of ``checkpoint``.

    With several places, products by columns (attention out, MLP out) are partial sums, and the first place has
    their bias.
    """

    def __init__(
        self,
        arch: Architecture,
        checkpoint: Checkpoint,
        make_linear: MakeLinear = Linear,
        part: Part = WHOLE,
        make_exact: MakeLinear = Linear,
    ) -> None:
        """``make_exact`` for what is never rounded.

        Raises :class:`~dswire.errors.UnsupportedModel` where the heads or layers cannot be shared out so.
        """
        self.arch = arch
        self.checkpoint = checkpoint
        self.part = part
        self.root = checkpoint.root_of(arch.names.root, arch.names.embedding)
        #: layers of the stage
        self.layers = part.layers(arch.layers)
        self._q, self._kv = part.heads(arch.heads, arch.kv_heads)
        #: heads of the place
        self.heads, self.kv_heads = _length(self._q), _length(self._kv)
        #: tokens of the vocabulary that the place has
        self.vocabulary = part.piece(arch.vocab_size)
        self._make, self._make_exact = make_linear, make_exact

    def finish(self) -> None:
        """All is taken. Raises :class:`~dswire.errors.UnsupportedModel` for what has no place in the model."""
        if not self.part.whole:
            self._skip_others()
        self.checkpoint.finish()

    def _skip_others(self) -> None:
        """Let go of what other ranks take."""
        names = self.arch.names
        outer = (names.embedding, names.positions, names.project_in, names.project_out, names.final_norm)
        for name in [names.head, *(self.root + name for name in outer)]:
            self.checkpoint.skip(name + ".weight")
            self.checkpoint.skip(name + ".bias")
        for index in set(range(self.arch.layers)) - set(self.layers):
            self.checkpoint.skip_under(self.root + names.layer.format(index))

    def embedding(self) -> Tensor:
        """``[tokens of the vocabulary, embedding_size]``."""
        return self.whole_embedding(self.vocabulary)

    def whole_embedding(self, rows: slice = _ALL) -> Tensor:
        """``[vocab_size, embedding_size]``."""
        name = self.root + self.arch.names.embedding + ".weight"
        return self.checkpoint.take(name, (self.arch.vocab_size, self.arch.embedding_size), rows)

    def positions(self) -> Tensor | None:
        """``[max_positions, hidden_size]``, where positions are learned."""
        arch = self.arch
        if arch.position_offset is None:
            return None
        rows = arch.max_positions + arch.position_offset
        return self._take(arch.names.positions, (rows, arch.hidden_size))[arch.position_offset :]

    def projection(self, name: str, rows: int, columns: int) -> AnyLinear | None:
        """A matrix before or behind the layers."""
        return self._linear([self.root + name], [_whole(rows)], columns) if name else None

    def head(self, embedding: Tensor | None) -> AnyLinear:
        """Hidden states to the logits of :attr:`vocabulary`; ``embedding`` where that is also the head."""
        name = self.arch.names.head + ".weight"
        if embedding is not None:
            self.checkpoint.skip(name)
            return self._make(embedding, None)
        shape = (self.arch.vocab_size, self.arch.embedding_size)
        return self._make(self.checkpoint.take(name, shape, self.vocabulary), None)

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
        """Rows: the place's Q heads, K heads, V heads."""
        arch, size = self.arch, self.arch.head_dim
        q, kv = (_scaled(heads, size) for heads in (self._q, self._kv))
        names = [self.root + layer + name for name in arch.names.qkv]
        of_q, of_kv = arch.heads * size, arch.kv_heads * size
        if arch.qkv_by_head:
            rows = [_Rows(3 * of_q, (_scaled(self._q, 3 * size),))]
        elif len(names) == 1:
            rows = [_Rows(of_q + 2 * of_kv, (q, _moved(kv, of_q), _moved(kv, of_q + of_kv)))]
        else:
            rows = [_Rows(of_q, (q,)), _Rows(of_kv, (kv,)), _Rows(of_kv, (kv,))]
        return self._linear(names, rows, arch.hidden_size, arch.qkv_bias, by_head=arch.qkv_by_head)

    def attention_out(self, layer: str) -> AnyLinear:
        """The place's heads to hidden."""
        arch = self.arch
        name = self.root + layer + arch.names.attention_out
        heads = _scaled(self._q, arch.head_dim)
        return self._to_hidden(name, arch.heads * arch.head_dim, heads, arch.attention_out_bias)

    def mlp(self, layer: str, sparse: bool) -> AnyMlp:
        """The feed-forward part of a layer."""
        arch, names = self.arch, self.arch.names
        if sparse:
            return self._experts(self.root + layer)
        prefix = self.root + layer
        if arch.mlp.gated:
            return self._gated(prefix, names.mlp_in, names.mlp_out, arch.mlp.size, arch.mlp.bias)
        inner = self.part.piece(arch.mlp.size)
        rows = [_Rows(arch.mlp.size, (inner,))]
        up = self._linear([prefix + names.mlp_in[0]], rows, arch.hidden_size, arch.mlp.bias)
        down = self._to_hidden(prefix + names.mlp_out, arch.mlp.size, inner, arch.mlp.bias)
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
            shared = SharedExpert(self._make_exact(gate), mlp)
        return MixtureOfExperts(self._make_exact(router), each, experts.per_token, experts.renormalise, shared)

    def _gated(
        self, prefix: str, names_in: Sequence[str], name_out: str, size: int, bias: bool = False
    ) -> GatedMlp:
        inner = self.part.piece(size)
        rows = [_Rows(size, (inner,))] * 2 if len(names_in) > 1 else [_Rows(2 * size, (inner, _moved(inner, size)))]
        gate_up = self._linear([prefix + name for name in names_in], rows, self.arch.hidden_size, bias)
        down = self._to_hidden(prefix + name_out, size, inner, bias)
        return GatedMlp(gate_up, down, self.arch.mlp.activation)

    def _to_hidden(self, name: str, size: int, inner: slice, bias: bool) -> AnyLinear:
        """A matrix ``[hidden, size]`` of which the place has the columns ``inner``."""
        if bias and self.part.place:
            self.checkpoint.skip(f"{name}.bias")
            bias = False
        return self._linear([name], [_whole(self.arch.hidden_size)], size, bias, inner=inner)

    def _linear(
        self,
        names: Sequence[str],
        rows: Sequence[_Rows],
        columns: int,
        bias: bool = False,
        *,
        inner: slice = _ALL,
        by_head: bool = False,
    ) -> AnyLinear:
        weight = self._rows([f"{name}.weight" for name in names], rows, columns, inner=inner)
        offset = self._rows([f"{name}.bias" for name in names], rows) if bias else None
        if by_head:
            weight = self._sorted_by_kind(weight)
            offset = None if offset is None else self._sorted_by_kind(offset)
        whole = inner in (_ALL, slice(0, columns))
        cut = None if whole else Cut(inner.start, partial(self._peaks, names[0], rows, columns, inner))
        return self._make(weight, offset, cut)

    def _peaks(self, name: str, rows: Sequence[_Rows], columns: int, inner: slice) -> Tensor:
        groups = slice(inner.start // GROUP * GROUP, min(-(-inner.stop // GROUP) * GROUP, columns))
        return peaks_of(self._rows([f"{name}.weight"], rows, columns, inner=groups))

    def _rows(self, names: Sequence[str], rows: Sequence[_Rows], *columns: int, inner: slice = _ALL) -> Tensor:
        pieces: list[Tensor] = []
        for name, row in zip(names, rows, strict=True):
            if self.arch.transposed and columns:
                stored = self.checkpoint.view(name, (*columns, row.count)).t()
            else:
                stored = self.checkpoint.view(name, (row.count, *columns))
            pieces += [stored[taken, inner] if columns else stored[taken] for taken in row.taken]
        return self.checkpoint.stack(pieces)

    def _sorted_by_kind(self, rows: Tensor) -> Tensor:
        """Rows that go by head (Q, K, V of the first...) brought into the order Q heads, K heads, V heads."""
        parted = rows.view(self.heads, 3, self.arch.head_dim, *rows.shape[1:])
        return parted.transpose(0, 1).reshape(rows.shape)

    def _take(self, name: str, shape: Sequence[int], what: str = ".weight") -> Tensor:
        return self.checkpoint.take(self.root + name + what, shape)


def _whole(rows: int) -> _Rows:
    return _Rows(rows, (_ALL,))


def _scaled(piece: slice, factor: int) -> slice:
    return slice(piece.start * factor, piece.stop * factor)


def _moved(piece: slice, by: int) -> slice:
    return slice(piece.start + by, piece.stop + by)


def _length(piece: slice) -> int:
    length: int = piece.stop - piece.start
    return length
