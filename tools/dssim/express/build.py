"""The compiled simulation: built at its first use, once for all processes of this host and user."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dsengine.lock import exclusive
from dsengine.native.build import compiler
from dsengine.store import home
from dswire.errors import DsError

_log = logging.getLogger(__name__)
#: no -ffast-math, and no fused multiplication: times are to be those that Python computes
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra")
_SOURCES = Path(__file__).parent
#: the longest compilation that is waited for
BUILD_WAIT_S = 120.0


@cache
def library() -> Callable[..., int] | None:
    """The function ``simulate`` of ``simulation.cpp``; None where it cannot be built, which is logged."""
    using = compiler()
    if using is None:
        _log.info("no C++ compiler: simulations run on the machines only")
        return None
    try:
        loaded = ctypes.CDLL(str(_built(using)))
    except (OSError, subprocess.SubprocessError, DsError) as error:
        _log.warning("the compiled simulation cannot be built: %s", error)
        return None
    simulate: Callable[..., int] = loaded.simulate
    return simulate


def _built(using: str) -> Path:
    digest = hashlib.sha256("\0".join((using, *FLAGS)).encode())
    for source in [*sorted(_SOURCES.glob("*.h")), *sorted(_SOURCES.glob("*.cpp"))]:
        digest.update(source.read_bytes())
    path = home() / "kernels" / f"express-{digest.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    with exclusive(path.with_suffix(".lock"), wait_s=BUILD_WAIT_S):
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                command = [using, *FLAGS, str(_SOURCES / "simulation.cpp"), "-o", str(made)]
                subprocess.run(command, capture_output=True, text=True, timeout=BUILD_WAIT_S, check=True)
                made.rename(path)
    return path
