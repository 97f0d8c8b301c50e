"""The compiled kernels as Python calls. Every call lets go of the interpreter's lock while it runs."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Sequence
from ctypes import POINTER, addressof, byref, c_int32, c_int64, c_void_p, sizeof
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsengine.native import structs
from dsengine.native.structs import CBatch, CDraw, CLinear, CModel, CPool
from dshost.library import build, load, native_flags
from dswire.errors import EngineFailed, OutOfMemory

#: dtype -> element kind in vector.h
ELEMENTS = {"float32": "F32", "bfloat16": "Bf16", "float16": "F16"}
#: output columns of one panel of packed weights
PANEL = 32


def padded(count: int) -> int:
    """``count`` columns in whole panels."""
    return -(-count // PANEL) * PANEL


def int8_nbytes(weight: Tensor, scale: Tensor) -> int:
    """Of panels of ``weight`` ``[out, in]`` in int8 with ``scale`` ``[out, groups]``."""
    return padded(len(weight)) * (weight.shape[1] + 2 * scale.shape[1])


class Library:
    """The kernels for one dtype."""

    def __init__(self, dtype: str) -> None:
        """Build where needed (a minute of one core at most), and load. Raises :class:`~dswire.errors.Failed`."""
        flags = (*native_flags(), f"-DELEMENT={ELEMENTS[dtype]}")
        path = build(dtype, Path(__file__).with_name("library.cpp"), flags)
        self._dtype = dtype
        #: another one for other sources, compilers or processors
        self.name = path.stem
        self._c = load(path)
        self._c.ds_open.argtypes, self._c.ds_open.restype = (POINTER(CModel), c_int32), c_void_p
        self._c.ds_forward.argtypes = (c_void_p, POINTER(CBatch), POINTER(CPool))
        self._c.ds_draw.argtypes = (c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p)
        self._c.ds_close.argtypes, self._c.ds_close.restype = (c_void_p,), None
        self._c.ds_pack.argtypes, self._c.ds_pack.restype = (c_void_p, c_int32, c_int32, c_void_p), None
        self._c.ds_pack_int8.argtypes = (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p)
        self._c.ds_pack_int8.restype = None
        self._c.ds_team.argtypes, self._c.ds_team.restype = (c_int32,), c_void_p
        self._c.ds_multiply.argtypes = (c_void_p, POINTER(CLinear), c_void_p, c_int32, c_void_p)
        self._c.ds_multiply.restype = None
        self._c.ds_team_close.argtypes, self._c.ds_team_close.restype = (c_void_p,), None
        sizes = (c_int32 * len(structs.ALL))()
        self._c.ds_sizes(sizes)
        if list(sizes) != [sizeof(kind) for kind in structs.ALL]:
            raise EngineFailed(f"{path} was built of other sources", remedy=f"remove {path}")

    def pack(self, weight: Tensor, panels: Tensor) -> None:
        """Bring ``weight`` ``[out, in]``, ``in`` even, into the flat ``panels``: ``padded(out) * in`` elements."""
        rows, columns = weight.shape
        assert len(panels) == padded(rows) * columns
        # a name of its own keeps a copy alive during the call
        whole = weight.contiguous()
        self._c.ds_pack(whole.data_ptr(), rows, columns, panels.data_ptr())

    def pack_int8(self, weight: Tensor, scale: Tensor, first_group: int, panels: Tensor) -> None:
        """Bring ``weight`` ``[out, in]``, ``in`` even, and ``scale`` ``[out, groups]`` into the bytes ``panels``.

        The first ``first_group`` columns, an even number, are the first group; :func:`int8_nbytes` tells of bytes.
        """
        rows, columns = weight.shape
        assert (weight.dtype, scale.dtype, len(scale)) == (torch.int8, torch.float32, rows)
        assert len(panels) == int8_nbytes(weight, scale)
        whole, scales = weight.contiguous(), scale.contiguous()
        self._c.ds_pack_int8(whole.data_ptr(), scales.data_ptr(), rows, columns, first_group, panels.data_ptr())

    def open(self, model: CModel, threads: int) -> Session:
        """A session of ``model``; all that it points to must outlive the session."""
        handle = self._c.ds_open(byref(model), threads)
        if not handle:
            raise OutOfMemory(f"no room for {threads} threads of the engine")
        return Session(self._c, handle)

    def team(self, threads: int) -> Team:
        """Threads for single products. Raises :class:`OutOfMemory`."""
        handle = self._c.ds_team(threads)
        if not handle:
            raise OutOfMemory(f"no room for {threads} threads of the engine")
        return Team(self._c, handle, torch.bfloat16 if self._dtype == "bfloat16" else torch.float32)


class Team:
    """Threads that make one product at a time."""

    def __init__(self, c: ctypes.CDLL, handle: int, active: torch.dtype) -> None:
        self._c = c
        self._handle = handle
        #: what activations are multiplied as
        self._active = active
        weakref.finalize(self, c.ds_team_close, handle)

    def multiply(self, matrix: CLinear, x: Tensor, y: Tensor) -> None:
        """``x`` ``[rows, in]`` times ``matrix`` into ``y`` ``[rows, padded(out)]``, contiguous and float32."""
        assert (x.shape[1], y.shape[1], y.dtype) == (matrix.in_, padded(matrix.out), torch.float32)
        # a name of its own keeps a copy alive during the call
        rows = x.to(self._active).contiguous()
        self._c.ds_multiply(self._handle, byref(matrix), rows.data_ptr(), len(rows), y.data_ptr())


class Session:
    """Threads and scratch memory of one loaded model."""

    def __init__(self, c: ctypes.CDLL, handle: int) -> None:
        self._c = c
        self._handle = handle
        #: wall time of all steps so far
        self.spent_s = 0.0
        self._close = weakref.finalize(self, c.ds_close, handle)

    def forward(self, batch: CBatch, pool: CPool) -> None:
        """One step. Raises :class:`OutOfMemory`."""
        begin = time.perf_counter()
        failed = self._c.ds_forward(self._handle, byref(batch), byref(pool))
        self.spent_s += time.perf_counter() - begin
        if failed:
            raise OutOfMemory(
                f"no room for a step of {batch.rows} tokens", remedy="lower the batch limits in the topology"
            )

    def draw(self, logits: Tensor, draws: Sequence[CDraw]) -> None:
        """Answer ``draws``, one for each row of ``logits`` ``[rows, vocab_size]`` float32.

        Raises :class:`OutOfMemory`.
        """
        rows, vocab = logits.shape
        assert (rows, logits.dtype, logits.stride(1)) == (len(draws), torch.float32, 1)
        addresses = (c_void_p * rows)(*map(addressof, draws))
        if self._c.ds_draw(self._handle, logits.data_ptr(), logits.stride(0), vocab, rows, addresses):
            raise OutOfMemory("no room for drawing tokens", remedy="lower the batch limits in the topology")

    def close(self) -> None:
        """End the threads; no step can follow. Doing it twice is harmless."""
        self._close()


@cache
def library(dtype: str) -> Library:
    """The kernels for ``dtype``, loaded once a process. Raises :class:`~dswire.errors.Failed`."""
    return Library(dtype)
