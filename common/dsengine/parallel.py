"""Which part of a model one rank of an instance computes, and what it asks of the other ranks meanwhile.

An instance of ``tp * pp`` ranks has ``pp`` stages of consecutive layers, and in each stage ``tp`` places that share
every matrix out: attention by heads, feed-forward parts by their inner dimension, embedding and output head by the
vocabulary. Rank numbers are stage-major, as in :mod:`dskv.shards`. All ranks run the same steps in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dskv.shards import head_ranges, stage_layers
from dswire.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part; the default is the whole model. Sizes are shared out as evenly as can be."""

    tp: int = 1
    pp: int = 1
    rank: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} of tp {self.tp} and pp {self.pp}"

    @property
    def stage(self) -> int:
        """Counts from 0, where tokens come in."""
        return self.rank // self.tp

    @property
    def place(self) -> int:
        """Among the ranks of its stage."""
        return self.rank % self.tp

    @property
    def whole(self) -> bool:
        """There is no other rank."""
        return self.tp * self.pp == 1

    @property
    def first(self) -> bool:
        """Of the stage where tokens come in."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Of the stage where logits come out."""
        return self.stage == self.pp - 1

    @property
    def draws(self) -> bool:
        """The rank that has the logits, and with them the next tokens."""
        return self.rank == drawing_rank(self.tp, self.pp)

    def layers(self, count: int) -> range:
        """The layers of the stage, of ``count``. Raises :class:`UnsupportedModel` for too many stages."""
        return range(*stage_layers(count, self.pp)[self.stage])

    def heads(self, heads: int, kv_heads: int) -> tuple[slice, slice]:
        """The query heads and KV heads of the place. Raises :class:`UnsupportedModel` where none are even."""
        if heads % self.tp:
            raise UnsupportedModel(
                f"{heads} attention heads cannot be shared by tp {self.tp}",
                remedy=f"choose a tp that divides {heads}",
            )
        each = heads // self.tp
        return slice(self.place * each, (self.place + 1) * each), slice(*head_ranges(kv_heads, self.tp)[self.place])

    def piece(self, size: int) -> slice:
        """The place's piece of a dimension."""
        return self.pieces(size)[self.place]

    def pieces(self, size: int) -> tuple[slice, ...]:
        """The piece of every place."""
        if size < self.tp:
            raise UnsupportedModel(f"a dimension of {size} cannot be shared by tp {self.tp}")
        return tuple(slice(*bounds) for bounds in stage_layers(size, self.tp))


#: all of a model
WHOLE = Part()


def drawing_rank(tp: int, pp: int) -> int:
    """The first place of the last stage: it draws the tokens, and it is the process that all others know."""
    return (pp - 1) * tp


class Peers(Protocol):
    """The other ranks. Each call meets the same call of them, and raises ``RuntimeError`` when one is gone."""

    def add(self, x: Tensor) -> Tensor:
        """The sum of all places' ``x``."""

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """All places' ``x`` ``[n, widths[place]]`` side by side, at place 0; None elsewhere."""

    def send(self, x: Tensor) -> None:
        """Give ``x`` to the same place of the next stage, without waiting for it."""

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the same place of the stage before gives."""


class Alone:
    """The peers of a rank that has none."""

    def add(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """``x``."""
        return x

    def send(self, x: Tensor) -> None:
        """Never called: there is no next stage."""
        raise AssertionError("there is no next stage")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Never called: there is no stage before."""
        raise AssertionError("there is no stage before")
