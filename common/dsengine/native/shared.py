"""Packed weights once per host: a file in ``DS_HOME/packed`` that every process of the host maps.

Its pages are the system's cache of the file: prefill, decode and every restart have them in common, and where
memory is short they can be dropped and read again. A file is made aside under a lock and renamed, so that one that
bears its name is whole. Whoever makes one removes those that it replaces, those of models that are gone, and those
that nobody has used for long.

Where there is no file to be had (a full disk, a directory that cannot be written) each process packs for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsengine.native.packed_file import SUFFIX, Mapped, Writer, read_index
from dsengine.native.packing import FileShelf, OwnShelf, Packed, Shelf
from dshost.home import home
from dshost.lock import exclusive
from dswire.errors import Failed

_log = logging.getLogger(__name__)

#: models with smaller files are packed by each process for itself
LEAST_NBYTES = 32 << 20
#: longest wait for another process that packs the same weights
PACK_WAIT_S = 600.0
#: files that no process has asked for in so many seconds go when another one is made
KEEP_S = 14 * 86400.0
_SOURCES = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Wanted:
    """Weights in a certain form."""

    model_dir: Path
    #: config.json and the files of weights
    files: tuple[Path, ...]
    #: dtype, rank, kernels: whatever else decides about the bytes
    form: str

    @property
    def nbytes(self) -> int:
        """Of the model's files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def stem(self) -> str:
        """The same for all versions of these weights."""
        place = hashlib.sha256(str(self.model_dir.resolve()).encode()).hexdigest()[:12]
        return f"{self.model_dir.resolve().name}-{place}-{self.form}"

    def key(self) -> str:
        """Changes with the model's files and with the sources that pack them."""
        digest = hashlib.sha256(self.form.encode())
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0".encode())
        for source in sorted(_SOURCES.rglob("*.py")):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:16]


def directory() -> Path:
    """Where the files are, or will be."""
    return home() / "packed"


def packed(wanted: Wanted, fill: Callable[[Shelf], None]) -> Packed:
    """The weights, mapped from the host's file where possible; ``fill`` packs them where they are not yet.

    Raises what ``fill`` raises, but for ``OSError`` of the shelf.
    """
    if wanted.nbytes < LEAST_NBYTES:
        return _own(fill)
    key = wanted.key()
    path = directory() / f"{wanted.stem}-{key}{SUFFIX}"
    try:
        mapped = _mapped(path, key) or _made(path, key, wanted, fill)
    except (OSError, Failed) as error:
        _log.warning(
            "%s cannot hold packed weights, so each process has its own: %s; make room there, or set DS_HOME",
            path.parent,
            error,
        )
        return _own(fill)
    return Packed.of(mapped)


def _own(fill: Callable[[Shelf], None]) -> Packed:
    shelf = OwnShelf()
    fill(shelf)
    return shelf.packed()


def _mapped(path: Path, key: str) -> Mapped | None:
    mapped = Mapped.open(path)
    if mapped is None or mapped.index.key != key:
        if path.exists():
            _log.warning("%s is damaged: packing the weights again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # what is in use is not tidied away
    _log.info("weights are mapped from %s", path)
    return mapped


def _made(path: Path, key: str, wanted: Wanted, fill: Callable[[Shelf], None]) -> Mapped:
    with exclusive(path.parent / f"{wanted.stem}.lock", wait_s=PACK_WAIT_S):
        if found := Mapped.open(path):
            if found.index.key == key:
                return found
            del found
        _tidy(path.parent, wanted.stem)
        free = shutil.disk_usage(path.parent).free
        if free < 2 * wanted.nbytes:
            raise Failed(f"{free} bytes are free, for a model of {wanted.nbytes}")
        _write(path, key, wanted, fill)
        made = Mapped.open(path)
    if made is None:
        raise Failed(f"{path} was removed or damaged as it was made")
    _log.info("weights were packed into %s", path)
    return made


def _write(path: Path, key: str, wanted: Wanted, fill: Callable[[Shelf], None]) -> None:
    aside = path.with_suffix(".tmp")
    writer = Writer(aside)
    try:
        fill(FileShelf(writer))
        writer.finish(key, wanted.model_dir.resolve())
        aside.rename(path)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)


def _tidy(folder: Path, stem: str) -> None:
    """Remove what nobody will ask for again. Processes that have it mapped keep it."""
    now = time.time()
    for path in files(folder):
        index = read_index(path)
        replaced = path.name.startswith(f"{stem}-")
        if replaced or index is None or not os.path.isdir(index.model_dir) or now - path.stat().st_mtime > KEEP_S:
            path.unlink(missing_ok=True)


def files(folder: Path) -> Iterator[Path]:
    """All files of packed weights in ``folder``, in order."""
    yield from sorted(folder.glob(f"*{SUFFIX}"))
