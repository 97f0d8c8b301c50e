"""The C heap of a process through which large messages go.

glibc gives large blocks back to the system as soon as they are free, and the next message of that size pays for
fresh pages again: as much time as copying it takes.
"""

from __future__ import annotations

import ctypes

#: ``malloc.h``
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: the most that glibc takes
_MMAP_THRESHOLD_NBYTES = 32 << 20


def keep(nbytes: int) -> bool:
    """Have the heap keep ``nbytes`` that are free, for the next messages; False where the C library cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_NBYTES) and mallopt(_M_TRIM_THRESHOLD, nbytes))
