"""A mapped file that the processes of one host share, of equal slots: a KV pool, or kept KV.

Invariants: the creator owns the file, keeps it locked while it lives, and unlinks it on ``close``; whoever opened
it only unmaps. A file whose creator was killed stays behind: the next creator of the same path replaces it, and the
supervisor removes the run's directory. The file is sparse until written, warmed or reserved, and its size is
exactly ``slots * slot_nbytes``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from dskv.copying import copier
from dswire.errors import DuplicateName, OutOfMemory, TransferFailed

#: ``linux/mman.h``: have the pages of a range mapped, as reading or writing would; since Linux 5.14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
#: what is asked for at once
_WARM_NBYTES = 2 << 20


class Segment:
    """``slots`` slots of ``slot_nbytes`` bytes each, mapped into this process."""

    def __init__(
        self, path: Path, slots: int, slot_nbytes: int, file: int, mapped: mmap.mmap, *, owner: bool
    ) -> None:
        self.path = path
        self.slots = slots
        self.slot_nbytes = slot_nbytes
        #: its descriptor, which holds the creator's lock
        self._file = file
        self._map = mapped
        self._view = memoryview(mapped)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._owner = owner
        self._cooling = threading.Event()
        self._warming: threading.Thread | None = None

    @classmethod
    def create(cls, path: Path, slots: int, slot_nbytes: int, *, sparse: bool = False) -> Segment:
        """Make the file, replacing one that a killed process left.

        ``sparse``: it need not fit as a whole, for nothing is written but what was reserved.

        Raises :class:`DuplicateName` when a live process has it, and :class:`OutOfMemory`.
        """
        nbytes = slots * slot_nbytes
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_live(path)
        room = os.statvfs(path.parent)
        if not sparse and nbytes > room.f_bavail * room.f_frsize:
            raise OutOfMemory(
                f"{path}: {nbytes} bytes of shared memory are wanted, {room.f_bavail * room.f_frsize} are free",
                remedy="lower kv.memory or relay.keep in the topology, or enlarge the shared-memory mount",
            )
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, nbytes)
            mapped = mmap.mmap(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, slots, slot_nbytes, fd, mapped, owner=True)

    @classmethod
    def open(cls, path: Path, slots: int, slot_nbytes: int, *, writable: bool = False) -> Segment:
        """Map another process's file, read-only unless ``writable``. Raises :class:`TransferFailed`."""
        # a private mapping shows what the owner writes, too, and has an address, which one for reading only has not
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        try:
            fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise TransferFailed(f"{path}: cannot be mapped: {error.strerror}") from error
        try:
            size = os.fstat(fd).st_size
            if size != slots * slot_nbytes:
                raise TransferFailed(f"{path}: has {size} bytes, {slots} slots of {slot_nbytes} were announced")
            mapped = mmap.mmap(fd, size, access=access)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, slots, slot_nbytes, fd, mapped, owner=False)

    @property
    def buffer(self) -> mmap.mmap:
        """The whole mapping, for ``torch.frombuffer``."""
        return self._map

    def slot(self, index: int) -> memoryview:
        """The bytes of slot ``index``. Raises :class:`TransferFailed` outside ``0 <= index < slots``."""
        self.check(index)
        start = index * self.slot_nbytes
        return self._view[start : start + self.slot_nbytes]

    def check(self, index: int) -> None:
        """Raises :class:`TransferFailed` outside ``0 <= index < slots``."""
        if not 0 <= index < self.slots:
            raise TransferFailed(f"{self.path}: slot {index} of {self.slots} does not exist")

    def copy_from(
        self, source: Segment, theirs: Sequence[int], mine: Sequence[int], *, summed: bool = False
    ) -> bytes:
        """Copy slots of ``source``, of the same size, and tell their sums where ``summed``.

        Other threads of this process go on meanwhile.
        """
        nbytes = self.slot_nbytes
        if source.slot_nbytes != nbytes:
            raise TransferFailed(f"blocks of {source.slot_nbytes} bytes cannot go into blocks of {nbytes} bytes")
        for segment, indices in ((source, theirs), (self, mine)):
            for index in indices:
                segment.check(index)
        return copier()(self._address, source._address, nbytes, mine, theirs, summed=summed)

    def send(self, connection: socket.socket, indices: Sequence[int]) -> None:
        """Send slots in order, as the file's own pages, which nobody copies on this side.

        What is on its way shows what is written meanwhile. ``connection`` blocks. Raises ``OSError`` and
        :class:`TransferFailed`.
        """
        # whole packets, however small the slots
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        for index in indices:
            self.check(index)
            at, end = index * self.slot_nbytes, (index + 1) * self.slot_nbytes
            while at < end:
                sent = os.sendfile(connection.fileno(), self._file, at, end - at)
                if not sent:
                    raise TransferFailed(f"{self.path}: was cut short")
                at += sent
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    def reserve(self, indices: Sequence[int]) -> None:
        """Have the pages of these slots, as writing would, which ends a process that finds none.

        Raises :class:`TransferFailed`.
        """
        try:
            for first, count in _runs(indices):
                os.posix_fallocate(self._file, first * self.slot_nbytes, count * self.slot_nbytes)
        except OSError as error:
            raise TransferFailed(
                f"{self.path}: no room for {len(indices)} slots of {self.slot_nbytes} bytes: {error.strerror}",
                remedy="enlarge the shared-memory mount, or lower kv.memory or relay.keep in the topology",
            ) from error

    def discard(self, indices: Sequence[int]) -> None:
        """Give back the pages that hold nothing but these slots, whose bytes mean nothing from now on."""
        for first, count in _runs(indices):
            start = -(-first * self.slot_nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + count) * self.slot_nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                # a file system that cannot keeps them
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_REMOVE, start, end - start)

    def warm(self) -> None:
        """Begin to have all pages mapped, in a thread.

        The first write to a fresh page costs several times the copy, and the first look at one that another process
        has written nearly as much as the copy. Of another process's file only what has pages is looked at, for a
        look at the rest would make some. Nothing depends on its end; where the system cannot, pages come as they
        are touched.
        """
        self._warming = threading.Thread(target=self._populate, name="warm", daemon=True)
        self._warming.start()

    def warmed(self, timeout_s: float) -> bool:
        """Wait until :meth:`warm` is through; whether it is."""
        if self._warming is not None:
            self._warming.join(timeout_s)
        return self._warming is None or not self._warming.is_alive()

    def _populate(self) -> None:
        # unlike mmap.madvise, a call by ctypes lets the other threads run
        madvise = ctypes.CDLL(None).madvise
        first = ctypes.c_char.from_buffer(self._map)
        nbytes = self.slots * self.slot_nbytes
        advice = _MADV_POPULATE_WRITE if self._owner else _MADV_POPULATE_READ
        with contextlib.suppress(OSError):
            for at in range(0, nbytes, _WARM_NBYTES):
                if self._cooling.is_set():
                    return
                length = min(_WARM_NBYTES, nbytes - at)
                if self._owner:
                    # pages for the file first: that holds up nobody, mapping holds up who maps
                    os.posix_fallocate(self._file, at, length)
                elif os.lseek(self._file, at, os.SEEK_HOLE) < at + length:
                    continue
                place = ctypes.c_void_p(ctypes.addressof(first) + at)
                madvise(place, ctypes.c_size_t(length), advice)

    def unlink(self) -> None:
        """Remove the file, if it is ours; the mapping stays usable."""
        if self._owner:
            self.path.unlink(missing_ok=True)
            self._owner = False

    def close(self) -> None:
        """Unmap; the owner also removes the file. Doing it twice is harmless.

        A tensor that still looks at the mapping keeps the pages (not the file) until it is gone.
        """
        self._cooling.set()
        if self._warming is not None:
            self._warming.join()
        self._view.release()
        self.unlink()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        # with somebody (a tensor) who still looks at the pages they stay, until that object goes
        with contextlib.suppress(BufferError):
            self._map.close()


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and number of those that lie side by side."""
    for _, places in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in places]
        yield run[0], len(run)


def _refuse_live(path: Path) -> None:
    """A live owner keeps its file locked: a second process of its name must not take the file from under it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DuplicateName(f"{path}: a live process of that name uses it") from error
    finally:
        os.close(fd)


class SegmentCache:
    """Other processes' segments, mapped once each and again when their file was replaced by a restart."""

    def __init__(self, *, warm: bool = False) -> None:
        """``warm``: much will be read of each, so have its pages mapped before (:meth:`Segment.warm`)."""
        self._warm = warm
        #: by path, as a string: this happens at each hand-off, and a Path takes as long as a small one
        self._open: dict[str, tuple[int, Segment]] = {}

    def get(self, path: str, slots: int, slot_nbytes: int, *, writable: bool = False) -> Segment:
        """The mapped segment. Raises :class:`TransferFailed` when it cannot be mapped."""
        try:
            inode = os.stat(path).st_ino
        except OSError as error:
            raise TransferFailed(f"{path}: cannot be mapped: {error.strerror}") from error
        known = self._open.get(path)
        if known is not None and known[0] == inode and known[1].slots == slots:
            return known[1]
        if known is not None:
            known[1].close()
        segment = Segment.open(Path(path), slots, slot_nbytes, writable=writable)
        if self._warm:
            segment.warm()
        self._open[path] = (inode, segment)
        return segment

    def close(self) -> None:
        """Unmap all."""
        for _, segment in self._open.values():
            segment.close()
        self._open.clear()
