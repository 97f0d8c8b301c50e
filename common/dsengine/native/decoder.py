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

from dsengine.architecture import Activation, Architecture, AttentionRule
from dsengine.native.library import Library, padded
from dsengine.native.packing import EXPERT, LINEARS, NORMS, Packed
from dsengine.native.structs import CBatch, CDraw, CExpert, CExperts, CLayer, CModel, CPool, CShape, Reduce
from dsengine.parallel import WHOLE, Part, Peers
from dsengine.pool import KvPool
from dsengine.rope import inverse_frequencies
from dsengine.rope_settings import Rope
from dsengine.span import Span

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu", "quick_gelu")


def obstacle(arch: Architecture, part: Part = WHOLE) -> str | None:
    """What of ``arch`` the kernels of some rank cannot compute; None when they can compute all of it."""
    names = arch.names
    scales = {(plan.rule.scale, plan.rule.softcap) for plan in arch.plan}
    sizes = {plan.rope.fraction for plan in arch.plan if plan.rope is not None}
    inner = [_length(piece) for size in _inner_sizes(arch) for piece in part.pieces(size)]
    odd = [size for size in (arch.hidden_size, *inner, arch.head_dim) if size % 2]
    problems = (
        (bool(names.project_in or names.project_out), "a projected embedding"),
        (bool(names.attention_outer or names.mlp_outer), "norms behind the residual"),
        (not (names.attention_before and names.mlp_before and names.final_norm), "layers without a norm"),
        (not arch.norm.affine, "norms without weights"),
        (len(scales) > 1 or len(sizes) > 1, "layers with unequal attention"),
        (bool(odd), f"a dimension of {odd[0] if odd else 0}"),
    )
    return next((text for found, text in problems if found), None)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a model that a rank computes, and who computes the rest."""

    arch: Architecture
    dtype: torch.dtype
    part: Part
    peers: Peers


class NativeDecoder:
    """One replica, or one rank's part of one, on this host's CPU."""

    def __init__(self, share: Share, weights: Packed, library: Library, max_len: int, threads: int) -> None:
        """``max_len`` positions get a rotation. Raises :class:`~dswire.errors.OutOfMemory`."""
        arch, part = share.arch, share.part
        self._weights = weights
        self._kept: list[Tensor] = []
        self._mixtures: list[object] = []
        self._ropes: dict[Rope, tuple[int, int]] = {}
        self._max_len = max_len
        self._widths = tuple(_length(piece) for piece in part.pieces(arch.vocab_size))
        self._vocab = self._widths[part.place]
        self._hidden_size = arch.hidden_size
        self._part = part
        self._peers = share.peers
        self._reduce = Reduce(self._add) if part.tp > 1 else None
        #: what went wrong between the ranks within a step: no exception can pass the kernels
        self._failure: Exception | None = None
        self._logits = torch.empty((0, padded(self._vocab)))
        self._session = library.open(self._model(share), threads)

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

    def draw(self, logits: Tensor, draws: Sequence[CDraw]) -> None:
        """Answer ``draws``, one for each row of ``logits``. Raises :class:`~dswire.errors.OutOfMemory`."""
        self._session.draw(logits, draws)

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

    def _model(self, share: Share) -> CModel:
        arch, part, weights = share.arch, share.part, self._weights
        rule = arch.plan[0].rule
        layers = [self._layer(index, arch) for index in part.layers(arch.layers)]
        self._layers = (CLayer * len(layers))(*layers)
        rotary = next((int(arch.head_dim * plan.rope.fraction) for plan in arch.plan if plan.rope is not None), 0)
        return CModel(
            layers=len(layers),
            hidden=arch.hidden_size,
            mlp=max(_length(part.piece(size)) for size in _inner_sizes(arch)),
            vocab=self._vocab,
            rotary=rotary,
            activation=_ACTIVATIONS.index(arch.mlp.activation),
            parallel=arch.parallel,
            eps=arch.norm.eps,
            # As in transformers, the scale is rounded to the dtype of the weights before it is used.
            embedding_scale=torch.tensor(arch.embedding_scale, dtype=share.dtype).item(),
            logit_softcap=arch.logit_softcap or 0,
            shape=_shape(arch, part, rule),
            embedding=weights.address("embedding"),
            position_embedding=weights.address("positions"),
            final_norm=weights.norm("final_norm"),
            head=weights.linear("head"),
            layer=ctypes.addressof(self._layers),
            reduce=None if self._reduce is None else ctypes.cast(self._reduce, ctypes.c_void_p).value,
        )

    def _layer(self, index: int, arch: Architecture) -> CLayer:
        plan, weights = arch.plan[index], self._weights
        cos, sin = (None, None) if plan.rope is None else self._rotation(plan.rope, arch.head_dim)
        norms = {name: weights.norm(f"{index}.{name}") for name in NORMS}
        linears = {name: weights.linear(f"{index}.{name}") for name in LINEARS}
        experts = self._mixture(index, arch) if plan.sparse else None
        return CLayer(**norms, **linears, cos=cos, sin=sin, experts=experts, window=plan.rule.window or 0)

    def _mixture(self, index: int, arch: Architecture) -> int:
        """The address of a layer's experts."""
        weights, experts = self._weights, arch.experts
        assert experts is not None  # a plan with sparse layers comes with experts
        numbers = range(experts.count)
        each = (CExpert * experts.count)(*(_expert(weights, f"{index}.expert.{number}") for number in numbers))
        mixture = CExperts(
            router=weights.linear(f"{index}.router"),
            shared_gate=weights.linear(f"{index}.shared_gate"),
            shared=_expert(weights, f"{index}.shared"),
            each=ctypes.addressof(each),
            count=experts.count,
            per_token=experts.per_token,
            renormalise=experts.renormalise,
        )
        self._mixtures += each, mixture
        return ctypes.addressof(mixture)

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


def _inner_sizes(arch: Architecture) -> list[int]:
    """Of the networks that layers have, or that their experts are."""
    sizes = [arch.mlp.size] if not all(plan.sparse for plan in arch.plan) else []
    if any(plan.sparse for plan in arch.plan) and arch.experts is not None:
        sizes += [size for size in (arch.experts.size, arch.experts.shared_size) if size]
    return sizes


def _expert(weights: Packed, name: str) -> CExpert:
    return CExpert(**{part: weights.linear(f"{name}.{part}") for part in EXPERT})


def _shape(arch: Architecture, part: Part, rule: AttentionRule) -> CShape:
    heads, kv_heads = part.heads(arch.heads, arch.kv_heads)
    return CShape(
        heads=_length(heads),
        kv_heads=_length(kv_heads),
        head_dim=arch.head_dim,
        scale=arch.head_dim**-0.5 if rule.scale is None else rule.scale,
        softcap=rule.softcap or 0,
    )


def _length(piece: slice) -> int:
    length: int = piece.stop - piece.start
    return length


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
