"""Compiling the kernels for this host, once for all its processes.

The library lies under ``DS_HOME/kernels``, named by a hash of sources, compiler, flags and processor: another
source or machine makes another file, and a file that is there is whole (written aside, then renamed).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from dsengine.lock import exclusive
from dsengine.store import home
from dswire.errors import EngineFailed

#: the longest compilation that is waited for, in this process or in another one
BUILD_WAIT_S = 300.0
#: as the compiler names them; -march=native is why the processor is in the file's name
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-psabi",
)
#: dtype -> element kind in vector.h
ELEMENTS = {"float32": "F32", "bfloat16": "Bf16", "float16": "F16"}
_SOURCES = Path(__file__).parent


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, else the first of g++ and clang++ on the path."""
    names = [chosen] if (chosen := os.environ.get("CXX")) else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def library_path(dtype: str, using: str) -> Path:
    """Where the library of ``dtype`` that the compiler ``using`` makes is, or will be."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.h")) + sorted(_SOURCES.glob("*.cpp")):
        digest.update(source.read_bytes())
    digest.update("\0".join((using, *_flags(), platform.machine(), _processor())).encode())
    return home() / "kernels" / f"{dtype}-{digest.hexdigest()[:16]}.so"


def build(dtype: str) -> Path:
    """The library of ``dtype``, compiled if it is not there yet (a minute of one core at most).

    Raises :class:`EngineFailed` without a compiler or when it fails, and :class:`~dswire.errors.Failed` when
    another process compiles for longer than :data:`BUILD_WAIT_S`.
    """
    using = compiler()
    if using is None:
        raise EngineFailed("there is no C++ compiler on the path", remedy="install g++, or set CXX")
    path = library_path(dtype, using)
    if path.is_file():
        return path
    try:
        with exclusive(path.with_suffix(".lock"), wait_s=BUILD_WAIT_S):
            if not path.is_file():
                _compile(using, dtype, path)
    except OSError as error:
        raise EngineFailed(
            f"{path.parent} cannot hold compiled kernels: {error.strerror}",
            remedy="make it writable, or set DS_HOME to a directory that is",
        ) from error
    return path


def _flags() -> tuple[str, ...]:
    # The compiler prefers half vectors on many processors that do well with whole ones.
    wide = platform.machine() in ("x86_64", "AMD64")
    return (*FLAGS, "-mprefer-vector-width=512") if wide else FLAGS


def _compile(using: str, dtype: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [using, *_flags(), f"-DELEMENT={ELEMENTS[dtype]}", str(_SOURCES / "library.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_WAIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineFailed(f"{using} did not compile the kernels: {error}") from error
        if done.returncode:
            raise EngineFailed(f"{using} did not compile the kernels: {done.stderr.strip()[-500:]}")
        made.rename(path)


def _processor() -> str:
    """Model and features of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
