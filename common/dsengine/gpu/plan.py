"""What the kernels are told of a step: one row of whole numbers, which goes to the GPU in one copy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsengine.span import Span

#: what a program of the kernels is told: first row, count, position, where its blocks begin
PROGRAM = 4
Numbers = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Room:
    """How many numbers of each kind a plan has, in their order."""

    tokens: int
    #: programs of single tokens, and of pieces of chunks
    singles: int
    chunks: int
    blocks: int

    @property
    def total(self) -> int:
        """Of all numbers."""
        return 3 * self.tokens + PROGRAM * (self.singles + self.chunks) + self.blocks


@dataclass(frozen=True, slots=True)
class Plan:
    """On the GPU, int32."""

    #: each ``[tokens]``; a slot is ``block * block_size + offset``, and -1 that of no token
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    #: ``[programs, 4]``
    singles: Tensor
    chunks: Tensor
    tables: Tensor

    @classmethod
    def of(cls, numbers: Tensor, room: Room) -> Plan:
        """Views of ``numbers`` ``[room.total]``."""
        singles, chunks = PROGRAM * room.singles, PROGRAM * room.chunks
        parts = numbers.split_with_sizes((room.tokens, room.tokens, room.tokens, singles, chunks, room.blocks))
        tokens, positions, slots, *programs, tables = parts
        return cls(tokens, positions, slots, programs[0].view(-1, PROGRAM), programs[1].view(-1, PROGRAM), tables)


def single_tokens(spans: Sequence[Span], block_size: int, room: Room) -> Tensor:
    """The numbers of a step of single tokens in a plan with ``room`` for at least as many; page-locked.

    They end with the last block: what is behind is nobody's.
    """
    count = len(spans)
    tables = array("i")
    programs = np.zeros((room.singles, PROGRAM), np.int32)
    starts = np.fromiter((span.start for span in spans), np.int32, count)
    programs[:count, 0] = np.arange(count)
    programs[:count, 1] = 1
    programs[:count, 2] = starts
    slots = np.full(room.tokens, -1, np.int32)
    for number, span in enumerate(spans):
        programs[number, 3] = len(tables)
        last = span.start // block_size
        tables.extend(span.blocks[: last + 1])
        slots[number] = tables[-1] * block_size + span.start % block_size
    tokens, positions = np.zeros(room.tokens, np.int32), np.zeros(room.tokens, np.int32)
    tokens[:count] = np.fromiter((span.tokens[0] for span in spans), np.int32, count)
    positions[:count] = starts
    return _locked([tokens, positions, slots, programs.reshape(-1), np.frombuffer(tables, np.int32)])


def any_spans(spans: Sequence[Span], block_size: int, piece: int) -> tuple[Tensor, Room]:
    """The numbers of any step, page-locked; a program of a chunk has at most ``piece`` tokens."""
    tokens, tables = array("i"), array("i")
    positions: list[Numbers] = []
    slots: list[Numbers] = []
    singles, chunks = array("i"), array("i")
    for span in spans:
        row, count = len(tokens), len(span.tokens)
        tokens.extend(span.tokens)
        at = np.arange(span.start, span.end, dtype=np.int32)
        blocks = np.array(span.blocks[: (span.end - 1) // block_size + 1], np.int32)
        positions.append(at)
        slots.append(blocks[at // block_size] * block_size + at % block_size)
        # a whole prompt is attended to without its blocks
        if count == 1:
            singles.extend((row, 1, span.start, len(tables)))
        elif span.start:
            for first in range(0, count, piece):
                chunks.extend((row + first, min(piece, count - first), span.start + first, len(tables)))
        tables.frombytes(blocks.tobytes())
    room = Room(len(tokens), len(singles) // PROGRAM, len(chunks) // PROGRAM, len(tables))
    lists = [np.frombuffer(one, np.int32) for one in (tokens, singles, chunks, tables)]
    return _locked([lists[0], np.concatenate(positions), np.concatenate(slots), *lists[1:]]), room


def _locked(parts: Sequence[Numbers]) -> Tensor:
    """Side by side, where a GPU can fetch them while this goes on; the memory is used again when it has."""
    numbers = torch.from_numpy(np.concatenate(parts))
    return numbers.pin_memory() if torch.cuda.is_available() else numbers
