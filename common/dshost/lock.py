"""A lock that processes of one host share, for work that only one of them should do.

Invariant: at most one holder a file. The kernel frees the lock with the last descriptor of its holder, so a holder
that is killed leaves nothing to clean up, and the lock file itself is never removed.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dswire.errors import Failed


@contextmanager
def exclusive(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold the lock of the file ``path`` (made when missing) inside the ``with`` block.

    Raises :class:`Failed` when another process still holds it after ``wait_s`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _wait(descriptor, path, wait_s)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path, wait_s: float) -> None:
    # flock() knows no timeout. A thread that is left behind gives the lock back as soon as it gets it:
    # the caller has closed the descriptor by then, and the thread's own reference ends with the call.
    held = threading.Event()

    def acquire() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        held.set()

    threading.Thread(target=acquire, name=f"lock {path.name}", daemon=True).start()
    if not held.wait(wait_s):
        raise Failed(
            f"another process has held {path} for more than {wait_s:.0f} s",
            remedy=f"see who it is with `fuser {path}`, and end it when it hangs",
        )
