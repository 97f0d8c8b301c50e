"""The weights of one rank in the form that the kernels read: pieces with names, in this process or in a file.

A layer's pieces are named ``INDEX.PART``, such as ``3.qkv`` or ``3.expert.0.gate``; biases ``NAME.bias``. Matrices
lie in panels (product.h), those in int8 with their scales (int8.h); norms and biases in float32, biases padded to
whole panels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsengine.int8 import GROUP, before, quantise
from dsengine.linear import Cut
from dsengine.mlp import GatedMlp, MixtureOfExperts
from dsengine.native.arena import Arena
from dsengine.native.library import Library, int8_nbytes, padded
from dsengine.native.packed_file import Mapped, Writer
from dsengine.native.structs import CLinear, CNorm
from dsengine.norm import AnyNorm, LayerNorm, RmsNormPlusOne
from dsengine.parts import Parts

#: pieces of a layer
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")
EXPERT = ("gate", "up", "down")
LINEARS = ("qkv", "attention_out", *EXPERT)


@dataclass(frozen=True, slots=True)
class RawLinear:
    """A matrix as it was stored: what :class:`~dsengine.parts.Parts` makes of it here."""

    #: ``[out, in]``
    weight: Tensor
    bias: Tensor | None = None
    cut: Cut | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in] -> [rows, out]``."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece in the memory of this process."""

    address: int
    rows: int
    columns: int
    #: columns of the first group of a matrix in int8; 0 for anything else
    first_group: int


class Packed:
    """All pieces of one rank, readable as long as this object lives."""

    def __init__(self, pieces: Mapping[str, Placed], owner: object) -> None:
        self._pieces = pieces
        self._owner = owner

    @classmethod
    def of(cls, mapped: Mapped) -> Packed:
        """The pieces of a file."""
        pieces = mapped.index.pieces.items()
        return cls(
            {name: Placed(mapped.address(one), one.rows, one.columns, one.first_group) for name, one in pieces},
            mapped,
        )

    def address(self, name: str) -> int | None:
        """Where ``name`` lies; None where there is no such piece."""
        piece = self._pieces.get(name)
        return None if piece is None else piece.address

    def linear(self, name: str) -> CLinear:
        """The matrix ``name``; one without panels where there is none."""
        piece = self._pieces.get(name)
        if piece is None:
            return CLinear()
        return CLinear(piece.address, self.address(f"{name}.bias"), piece.columns, piece.rows, piece.first_group)

    def norm(self, name: str) -> CNorm:
        """The norm ``name``; one without weights where there is none."""
        return CNorm(self.address(name), self.address(f"{name}.bias"))


class Shelf(Protocol):
    """Where pieces go."""

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` uninitialised elements, to be filled and put before the next are asked for."""
        ...

    def put(self, name: str, piece: Tensor, rows: int, columns: int, first_group: int = 0) -> None:
        """Keep the contiguous ``piece``, which nobody changes any more."""
        ...


class OwnShelf:
    """Pieces in memory of this process alone."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._kept: dict[str, Tensor] = {}
        self._pieces: dict[str, Placed] = {}

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """In huge pages, where the system gives them."""
        return self._arena.take(count, dtype)

    def put(self, name: str, piece: Tensor, rows: int, columns: int, first_group: int = 0) -> None:
        """Keep it where it is."""
        self._kept[name] = piece
        self._pieces[name] = Placed(piece.data_ptr(), rows, columns, first_group)

    def packed(self) -> Packed:
        """All that was put."""
        return Packed(self._pieces, self._kept)


class FileShelf:
    """Pieces that go to a file; what :meth:`room` gave is used again for the next one."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._room = torch.empty(0, dtype=torch.uint8)

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every piece."""
        nbytes = count * dtype.itemsize
        if len(self._room) < nbytes:
            self._room = torch.empty(nbytes, dtype=torch.uint8)
        return self._room[:nbytes].view(dtype)

    def put(self, name: str, piece: Tensor, rows: int, columns: int, first_group: int = 0) -> None:
        """Write it. Raises ``OSError``."""
        self._writer.put(name, piece.view(-1).view(torch.uint8).numpy().data, rows, columns, first_group)


class Packing:
    """Takes every tensor of a rank out of ``parts``, which makes :class:`RawLinear`, and puts it on a shelf."""

    def __init__(self, parts: Parts, library: Library, shelf: Shelf, *, int8: bool = False) -> None:
        """``int8``: matrices are kept in that."""
        self._int8 = int8
        self._parts = parts
        self._library = library
        self._shelf = shelf

    def run(self) -> None:
        """All of them. Raises :class:`~dswire.errors.UnsupportedModel` for tensors that are missing or surplus."""
        parts, names = self._parts, self._parts.arch.names
        self._outer()
        if parts.part.last:
            self._norm("final_norm", parts.norm(names.final_norm, parts.arch.hidden_size))
        for index in parts.layers:
            self._layer(index)
        parts.finish()

    def _outer(self) -> None:
        """Embedding and positions, which the first stage has, and the head, which the last has."""
        parts, part, tied = self._parts, self._parts.part, self._parts.arch.tied
        # all of it, at every place
        embedding = parts.whole_embedding() if part.first or (part.last and tied) else None
        if part.first:
            assert embedding is not None
            self._put("embedding", embedding)
            positions = parts.positions()
            if positions is not None:
                self._put("positions", positions.float())
        if part.last:
            head = parts.head(embedding[parts.vocabulary] if tied and embedding is not None else None)
            self._linear("head", head)

    def _layer(self, index: int) -> None:
        parts, arch, names = self._parts, self._parts.arch, self._parts.arch.names
        prefix = parts.layer(index)
        stored_as = (names.attention_before, names.attention_after, names.mlp_before, names.mlp_after)
        sizes = [arch.hidden_size] * 4 + [arch.head_dim] * 2
        for name, stored, size in zip(NORMS, (*stored_as, names.q_norm, names.k_norm), sizes, strict=True):
            self._norm(f"{index}.{name}", parts.norm(stored and prefix + stored, size))
        self._linear(f"{index}.qkv", parts.qkv(prefix))
        self._linear(f"{index}.attention_out", parts.attention_out(prefix))
        self._mlp(index, prefix)

    def _mlp(self, index: int, prefix: str) -> None:
        mlp = self._parts.mlp(prefix, self._parts.arch.plan[index].sparse)
        if isinstance(mlp, MixtureOfExperts):
            self._experts(str(index), mlp)
        elif isinstance(mlp, GatedMlp):
            self._gated(str(index), mlp)
        else:
            self._linear(f"{index}.down", mlp.down)
            self._linear(f"{index}.up", mlp.up)

    def _experts(self, name: str, mixture: MixtureOfExperts) -> None:
        self._linear(f"{name}.router", mixture.router, exact=True)
        for number, expert in enumerate(mixture.experts):
            self._gated(f"{name}.expert.{number}", expert)
        if mixture.shared is not None:
            self._linear(f"{name}.shared_gate", mixture.shared.gate, exact=True)
            self._gated(f"{name}.shared", mixture.shared.mlp)

    def _gated(self, name: str, mlp: GatedMlp) -> None:
        self._linear(f"{name}.down", mlp.down)
        both = mlp.gate_up
        assert isinstance(both, RawLinear)
        biases = (None, None) if both.bias is None else both.bias.chunk(2)
        for which, weight, bias in zip(("gate", "up"), both.weight.chunk(2), biases, strict=True):
            self._linear(f"{name}.{which}", RawLinear(weight, bias))

    def _linear(self, name: str, raw: object, *, exact: bool = False) -> None:
        assert isinstance(raw, RawLinear)
        (rows, columns), weight = raw.weight.shape, raw.weight
        if self._int8 and not exact:
            (q, scale), first_group = quantise(weight, raw.cut), GROUP - before(raw.cut)
            panels = self._shelf.room(int8_nbytes(q, scale), torch.uint8)
            self._library.pack_int8(q, scale, first_group, panels)
            self._shelf.put(name, panels, rows, columns, first_group)
        else:
            panels = self._shelf.room(padded(rows) * columns, weight.dtype)
            self._library.pack(weight, panels)
            self._shelf.put(name, panels, rows, columns)
        if raw.bias is not None:
            bias = torch.zeros(padded(rows))
            bias[:rows] = raw.bias
            self._put(f"{name}.bias", bias)

    def _norm(self, name: str, norm: AnyNorm | None) -> None:
        if norm is None:
            return
        assert norm.weight is not None  # obstacle() lets no other norm pass
        # A norm that adds one to its weight has done so already.
        assert not isinstance(norm, RmsNormPlusOne) or norm.weight.dtype == torch.float32
        self._put(name, norm.weight.float())
        if isinstance(norm, LayerNorm):
            bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            self._put(f"{name}.bias", bias.float())

    def _put(self, name: str, piece: Tensor) -> None:
        rows = len(piece) if piece.dim() > 1 else 1
        self._shelf.put(name, piece.contiguous(), rows, piece.shape[-1])
