"""The file of packed weights that the processes of a host map: pieces, and an index that tells what they are.

Layout: the pieces, each on a border of 64 bytes; the index, MessagePack; a footer of 24 bytes: magic, length and
xxh3_64 of the index. A file that was cut short has no footer where it ought to be, and one whose index makes no
sense is as good as none. The pieces have no sum: to check it would be to read them all at every start. No torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import xxhash

SUFFIX = ".weights"
_MAGIC = b"dspack02"
_FOOTER = struct.Struct("<8sQQ")
_BORDER = 64
#: ``linux/mman.h``: huge pages where the file system has them; have all pages now. Neither is needed to go on
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Where a piece lies in the file, and the matrix that it is (one row: a vector)."""

    offset: int
    nbytes: int
    rows: int
    columns: int
    #: columns of the first group of a matrix in int8; 0 for anything else
    first_group: int = 0


class Index(msgspec.Struct, frozen=True):
    """What a file holds."""

    #: all that the content was made from, in one word
    key: str
    #: the directory of the model, for people and for tidying up
    model_dir: str
    pieces: dict[str, Piece]


class Writer:
    """Writes a file from front to back; it is of no use before :meth:`finish`. Every call may raise ``OSError``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._at = 0
        self._pieces: dict[str, Piece] = {}

    def put(self, name: str, content: memoryview, rows: int, columns: int, first_group: int = 0) -> None:
        """Add a piece."""
        self._write(bytes(-self._at % _BORDER))
        self._pieces[name] = Piece(self._at, content.nbytes, rows, columns, first_group)
        self._write(content)

    def finish(self, key: str, model_dir: Path) -> None:
        """Write the index, and wait until all is on the disk."""
        index = msgspec.msgpack.encode(Index(key, str(model_dir), self._pieces))
        self._file.write(index)
        self._file.write(_FOOTER.pack(_MAGIC, len(index), xxhash.xxh3_64_intdigest(index)))
        self._file.flush()
        os.fdatasync(self._file.fileno())
        # what was written lies in memory in small pages: who maps it reads it again, in huge ones
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file. Doing it twice is harmless."""
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._at += len(content) if isinstance(content, bytes) else content.nbytes


class Mapped:
    """A file mapped read-only into this process: memory that all who map it have in common."""

    def __init__(self, index: Index, content: mmap.mmap) -> None:
        self.index = index
        self._content = np.frombuffer(content, dtype=np.uint8)
        # unlike mmap.madvise, a call by ctypes lets the other threads run
        madvise = ctypes.CDLL(None).madvise
        for advice in (_MADV_HUGEPAGE, _MADV_POPULATE_READ):
            madvise(ctypes.c_void_p(self._content.ctypes.data), ctypes.c_size_t(len(content)), advice)

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Map ``path``; None where there is no whole file of this format. Reads all that is not in memory."""
        try:
            with path.open("rb") as file:
                index = _read_index(file.fileno())
                return cls(index, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError, msgspec.MsgspecError):
            return None

    def address(self, piece: Piece) -> int:
        """Where ``piece`` lies in the memory of this process, as long as this object lives."""
        return int(self._content.ctypes.data) + piece.offset


def read_index(path: Path) -> Index | None:
    """What ``path`` holds; None where it is no whole file of this format."""
    try:
        with path.open("rb") as file:
            return _read_index(file.fileno())
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _read_index(descriptor: int) -> Index:
    """Raises ``ValueError`` where there is none that makes sense."""
    size = os.fstat(descriptor).st_size
    if size < _FOOTER.size:
        raise ValueError("no room for a footer")
    magic, length, digest = _FOOTER.unpack(os.pread(descriptor, _FOOTER.size, size - _FOOTER.size))
    start = size - _FOOTER.size - length
    if magic != _MAGIC or start < 0:
        raise ValueError("no footer")
    encoded = os.pread(descriptor, length, start)
    if xxhash.xxh3_64_intdigest(encoded) != digest:
        raise ValueError("the index is damaged")
    index = msgspec.msgpack.decode(encoded, type=Index)
    if any(piece.offset < 0 or piece.offset + piece.nbytes > start for piece in index.pieces.values()):
        raise ValueError("a piece outside the file")
    return index
