"""Compiling C++ for this host, once for all its processes.

A library lies under ``DS_HOME/kernels``, named by a hash of sources, compiler, flags and processor: another source
or machine makes another file, and a file that is there is whole (written aside, then renamed).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dshost.home import home
from dshost.lock import exclusive
from dswire.errors import Failed

#: the longest compilation that is waited for, in this process or in another one
BUILD_WAIT_S = 300.0
#: as the compiler names them
FLAGS = ("-std=c++20", "-fPIC", "-shared", "-Wall")
#: for this processor, which is in the file's name for it
NATIVE = (
    "-O3",
    "-march=native",
    "-pthread",
    "-fno-math-errno",
    # g++ says so of its own headers
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-psabi",
)


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, else the first of g++ and clang++ on the path."""
    names = [chosen] if (chosen := os.environ.get("CXX")) else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def native_flags() -> tuple[str, ...]:
    """Those that make the most of this processor."""
    # The compiler prefers half vectors on many processors that do well with whole ones.
    wide = platform.machine() in ("x86_64", "AMD64")
    return (*NATIVE, "-mprefer-vector-width=512") if wide else NATIVE


def build(name: str, source: Path, flags: Sequence[str]) -> Path:
    """The library ``name`` of ``source`` and what it includes from its folder, compiled if it is not there yet.

    Raises :class:`Failed` without a compiler, when it fails, when the home cannot hold the library, and when
    another process compiles for longer than :data:`BUILD_WAIT_S`.
    """
    using = compiler()
    if using is None:
        raise Failed("there is no C++ compiler on the path", remedy="install g++, or set CXX")
    path = home() / "kernels" / f"{name}-{_digest(using, source, flags)}.so"
    if path.is_file():
        return path
    try:
        with exclusive(path.with_suffix(".lock"), wait_s=BUILD_WAIT_S):
            if not path.is_file():
                _compile([using, *FLAGS, *flags, str(source)], path)
    except OSError as error:
        raise Failed(
            f"{path.parent} cannot hold compiled libraries: {error.strerror}",
            remedy="make it writable, or set DS_HOME to a directory that is",
        ) from error
    return path


def load(path: Path) -> ctypes.CDLL:
    """The library, in this process; its calls let go of the interpreter's lock. Raises :class:`Failed`."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Failed(f"{path} cannot be loaded: {error}", remedy=f"remove {path}") from error


def _digest(using: str, source: Path, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(source.parent.glob("*.h")) + sorted(source.parent.glob("*.cpp")):
        digest.update(file.read_bytes())
    digest.update("\0".join((using, *FLAGS, *flags, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, timeout=BUILD_WAIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"{command[0]} did not compile {command[-1]}: {error}") from error
        if done.returncode:
            raise Failed(f"{command[0]} did not compile {command[-1]}: {done.stderr.strip()[-500:]}")
        made.rename(path)


def _processor() -> str:
    """Model and features of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
