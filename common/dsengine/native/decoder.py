"""A decoder whose whole step is one call into the compiled kernels.

Invariants:

* A row's logits have the same bits whatever comes with it in its step, and whether it is reached in a whole prompt,
  in chunks or token by token: the order of every sum is fixed (product.h, attention.h).
* The residual stream is kept in float32, and each sum is made in float32 whatever the dtype.

Which architectures it can compute is told by :func:`obstacle`; the others go the way of :mod:`dsengine.decoder`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.architecture import Activation, Architecture, LayerPlan
from dsengine.int8 import quantise
from dsengine.linear import Peaks
from dsengine.mlp import GatedMlp, Mlp
from dsengine.native.arena import Arena
from dsengine.native.library import Library, linear, padded
from dsengine.native.structs import CBatch, CLayer, CLinear, CModel, CNorm, CPool, CShape, Reduce
from dsengine.norm import AnyNorm, LayerNorm, RmsNormPlusOne
from dsengine.parallel import WHOLE, Part, Peers
from dsengine.parts import Parts
from dsengine.pool import KvPool
from dsengine.rope import inverse_frequencies
from dsengine.rope_settings import Rope
from dsengine.span import Span

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu", "quick_gelu")


@dataclass(frozen=True, slots=True)
class RawLinear:
    """A matrix as it was stored: what :class:`~dsengine.parts.Parts` makes of it here."""

    #: ``[out, in]``
    weight: Tensor
    bias: Tensor | None = None
    peaks: Peaks | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


def obstacle(arch: Architecture, part: Part = WHOLE) -> str | None:
    """What of ``arch`` the kernels of some rank cannot compute; None when they can compute all of it."""
    names = arch.names
    scales = {(plan.rule.scale, plan.rule.softcap) for plan in arch.plan}
    sizes = {plan.rope.fraction for plan in arch.plan if plan.rope is not None}
    inner = [piece.stop - piece.start for piece in part.pieces(arch.mlp.size)]
    odd = [size for size in (arch.hidden_size, *inner, arch.head_dim) if size % 2]
    problems = (
        (any(plan.sparse for plan in arch.plan), "a mixture of experts"),
        (bool(names.project_in or names.project_out), "a projected embedding"),
        (bool(names.attention_outer or names.mlp_outer), "norms behind the residual"),
        (not (names.attention_before and names.mlp_before and names.final_norm), "layers without a norm"),
        (not arch.norm.affine, "norms without weights"),
        (len(scales) > 1 or len(sizes) > 1, "layers with unequal attention"),
        (bool(odd), f"a dimension of {odd[0] if odd else 0}"),
    )
    return next((text for found, text in problems if found), None)


class NativeDecoder:
    """One replica, or one rank's part of one, on this host's CPU."""

    def __init__(
        self, parts: Parts, library: Library, max_len: int, threads: int, peers: Peers, *, int8: bool = False
    ) -> None:
        """Take every tensor from ``parts``, which makes :class:`RawLinear`; ``max_len`` positions get a rotation;
        ``int8``: matrices are kept in that.

        Raises :class:`~dswire.errors.UnsupportedModel`, :class:`~dswire.errors.OutOfMemory`.
        """
        self._library = library
        self._int8 = int8
        self._arena = Arena()
        self._kept: list[Tensor] = []
        self._ropes: dict[Rope, tuple[int, int]] = {}
        self._max_len = max_len
        self._widths = tuple(_length(piece) for piece in parts.part.pieces(parts.arch.vocab_size))
        self._vocab = _length(parts.vocabulary)
        self._hidden_size = parts.arch.hidden_size
        self._part = parts.part
        self._peers = peers
        self._reduce = Reduce(self._add) if parts.part.tp > 1 else None
        #: what went wrong between the ranks within a step: no exception can pass the kernels
        self._failure: Exception | None = None
        self._logits = torch.empty((0, padded(self._vocab)))
        model = self._model(parts)
        parts.finish()
        self._session = library.open(model, threads)

    def forward(self, spans: Sequence[Span], picked: Sequence[int], pool: KvPool) -> Tensor | None:
        """Logits ``[len(picked), vocab_size]`` float32 of the rows ``picked``; writes the KV of all rows.

        Rows count through the tokens of all ``spans`` in order. The result is overwritten by the next call; it is
        None at a rank that does not draw.
        """
        tokens, tables = array("i"), array("i")
        starts, ends, table_starts = array("i"), array("i"), array("i")
        for span in spans:
            tokens.extend(span.tokens)
            starts.append(span.start)
            ends.append(len(tokens))
            table_starts.append(len(tables))
            tables.extend(span.blocks)
        wanted = array("i", picked)
        logits = self._room(len(wanted) if self._part.last else 0)
        between = (len(tokens), self._hidden_size)
        came = None if self._part.first else self._peers.receive(between, torch.float32)
        goes = None if self._part.last else torch.empty(between)
        addresses = [part.buffer_info()[0] for part in (tokens, starts, ends, tables, table_starts, wanted)]
        batch = CBatch(
            len(spans), len(tokens), len(wanted), 0, *addresses, logits.data_ptr(), _address(came), _address(goes)
        )
        self._session.forward(batch, CPool(pool.base, pool.layout.block_nbytes, pool.layout.block_size))
        if self._failure is not None:
            raise self._failure
        if goes is None:
            return self._peers.gather(logits[:, : self._vocab], self._widths)
        self._peers.send(goes)
        return None

    @property
    def spent_s(self) -> float:
        """Wall time inside the kernels so far."""
        return self._session.spent_s

    def close(self) -> None:
        """End the threads. Doing it twice is harmless."""
        self._session.close()

    def _add(self, address: int, count: int) -> None:
        """Add up all places' shares of what lies there; called by one of the kernels' threads."""
        if self._failure is not None:
            return
        try:
            x = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
            x.copy_(self._peers.add(x))
        except Exception as error:  # noqa: BLE001 - process boundary: forward() raises it
            self._failure = error

    def _room(self, rows: int) -> Tensor:
        if len(self._logits) < rows:
            self._logits = torch.empty((rows, padded(self._vocab)))
        return self._logits[:rows]

    def _model(self, parts: Parts) -> CModel:
        arch = parts.arch
        rule = arch.plan[0].rule
        embedding, positions, head = self._outer(parts)
        layers = [self._layer(parts, index, arch.plan[index]) for index in parts.layers]
        self._layers = (CLayer * len(layers))(*layers)
        rotary = next((int(arch.head_dim * plan.rope.fraction) for plan in arch.plan if plan.rope is not None), 0)
        return CModel(
            layers=len(layers),
            hidden=arch.hidden_size,
            mlp=_length(parts.part.piece(arch.mlp.size)),
            vocab=self._vocab,
            rotary=rotary,
            activation=_ACTIVATIONS.index(arch.mlp.activation),
            parallel=arch.parallel,
            eps=arch.norm.eps,
            # As in transformers, the scale is rounded to the dtype of the weights before it is used.
            embedding_scale=torch.tensor(arch.embedding_scale, dtype=parts.checkpoint.dtype).item(),
            logit_softcap=arch.logit_softcap or 0,
            shape=CShape(
                heads=parts.heads,
                kv_heads=parts.kv_heads,
                head_dim=arch.head_dim,
                scale=arch.head_dim**-0.5 if rule.scale is None else rule.scale,
                softcap=rule.softcap or 0,
            ),
            embedding=_address(embedding),
            position_embedding=None if positions is None else self._floats(positions),
            final_norm=self._norm(parts.norm(arch.names.final_norm, arch.hidden_size) if parts.part.last else None),
            head=head,
            layer=ctypes.addressof(self._layers),
            reduce=None if self._reduce is None else ctypes.cast(self._reduce, ctypes.c_void_p).value,
        )

    def _outer(self, parts: Parts) -> tuple[Tensor | None, Tensor | None, CLinear]:
        """Embedding and positions, which the first stage has, and the head, which the last has."""
        part, tied = parts.part, parts.arch.tied
        # All of it, at every place: in the dtype of the file it is memory that all processes of a host share.
        embedding = parts.whole_embedding() if part.first or (part.last and tied) else None
        if embedding is not None:
            self._kept.append(embedding)
        positions = parts.positions() if part.first else None
        if not part.last:
            return embedding, positions, CLinear()
        head = parts.head(embedding[parts.vocabulary] if tied and embedding is not None else None)
        assert isinstance(head, RawLinear)
        return embedding, positions, self._linear(head)

    def _layer(self, parts: Parts, index: int, plan: LayerPlan) -> CLayer:
        arch, names, prefix = parts.arch, parts.arch.names, parts.layer(index)

        def norm(name: str, size: int = arch.hidden_size) -> CNorm:
            return self._norm(parts.norm(name and prefix + name, size))

        cos, sin = (None, None) if plan.rope is None else self._rotation(plan.rope, arch.head_dim)
        qkv, out = parts.qkv(prefix), parts.attention_out(prefix)
        assert isinstance(qkv, RawLinear)
        assert isinstance(out, RawLinear)
        gate, up, down = self._mlp(parts, prefix)
        return CLayer(
            before_attention=norm(names.attention_before),
            after_attention=norm(names.attention_after),
            before_mlp=norm(names.mlp_before),
            after_mlp=norm(names.mlp_after),
            q_norm=norm(names.q_norm, arch.head_dim),
            k_norm=norm(names.k_norm, arch.head_dim),
            qkv=self._linear(qkv),
            attention_out=self._linear(out),
            gate=gate,
            up=up,
            down=down,
            cos=cos,
            sin=sin,
            window=plan.rule.window or 0,
        )

    def _mlp(self, parts: Parts, prefix: str) -> tuple[CLinear, CLinear, CLinear]:
        """gate, up and down; gate null where there is none."""
        mlp = parts.mlp(prefix, sparse=False)
        assert isinstance(mlp, Mlp | GatedMlp)
        first = mlp.gate_up if isinstance(mlp, GatedMlp) else mlp.up
        assert isinstance(first, RawLinear)
        assert isinstance(mlp.down, RawLinear)
        down = self._linear(mlp.down)
        if isinstance(mlp, Mlp):
            return CLinear(), self._linear(first), down
        weights = first.weight.chunk(2)
        biases = (None, None) if first.bias is None else first.bias.chunk(2)
        gate, up = (self._linear(RawLinear(weight, bias)) for weight, bias in zip(weights, biases, strict=True))
        return gate, up, down

    def _linear(self, raw: RawLinear) -> CLinear:
        (rows, columns), weight, bias, scale = raw.weight.shape, raw.weight, raw.bias, None
        if self._int8:
            weight, scale = quantise(weight, raw.peaks)
            bias = torch.zeros(rows) if bias is None else bias
        panels = self._library.pack(weight, self._arena)
        self._kept.append(panels)
        return linear(panels, self._padded(bias), self._padded(scale), rows, columns)

    def _padded(self, values: Tensor | None) -> Tensor | None:
        """In float32, to whole panels."""
        if values is None:
            return None
        wide = torch.zeros(padded(len(values)))
        wide[: len(values)] = values
        self._kept.append(wide)
        return wide

    def _norm(self, norm: AnyNorm | None) -> CNorm:
        if norm is None:
            return CNorm()
        assert norm.weight is not None  # obstacle() lets no other norm pass
        if isinstance(norm, LayerNorm):
            bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            return CNorm(self._floats(norm.weight), self._floats(bias))
        # A norm that adds one to its weight has done so already.
        assert not isinstance(norm, RmsNormPlusOne) or norm.weight.dtype == torch.float32
        return CNorm(self._floats(norm.weight), None)

    def _rotation(self, rope: Rope, head_dim: int) -> tuple[int, int]:
        """Addresses of cosines and sines ``[max_len, turned / 2]``."""
        if rope not in self._ropes:
            frequencies = inverse_frequencies(rope, int(head_dim * rope.fraction), self._max_len)
            angles = torch.outer(torch.arange(self._max_len, dtype=torch.float32), frequencies)
            cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
            self._ropes[rope] = (self._floats(cos), self._floats(sin))
        return self._ropes[rope]

    def _floats(self, values: Tensor) -> int:
        """The address of ``values`` in float32, kept as long as this object."""
        self._kept.append(values.float().contiguous())
        return self._kept[-1].data_ptr()


def _length(piece: slice) -> int:
    length: int = piece.stop - piece.start
    return length


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
