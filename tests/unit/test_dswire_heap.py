"""Large messages do not pay for fresh memory each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: page faults of holding six large blocks at once and freeing them, in a process whose heap holds nothing else
_PROGRAM = """
import resource
from dswire import heap

def hold_and_free():
    held = [bytearray(8 << 20) for _ in range(6)]

kept = {kept} and heap.keep(128 << 20)
hold_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
hold_and_free()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*, keep: bool) -> tuple[bool, int]:
    command = [sys.executable, "-c", _PROGRAM.format(kept=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


def test_memory_that_was_freed_is_used_again() -> None:
    kept, faults = _faults(keep=True)
    if not kept:
        pytest.skip("this C library has no mallopt")
    _, otherwise = _faults(keep=False)
    assert faults < otherwise / 10
