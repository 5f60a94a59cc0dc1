"""Memory of the host: large buffers that are used again cost nothing, new ones cost page faults.

XLA's CPU client asks the C library for the buffers of every call and gives them back after it. By
default glibc returns large ones to the system at once, so that each training step touches gigabytes
of new pages: measured, half of its time and more (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import sys

# Options of glibc's mallopt (malloc.h) and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEEP = {
    _MMAP_MAX: 0,  # large buffers come from the heap, too
    _TRIM_THRESHOLD: -1,  # the heap never shrinks
    _TOP_PAD: 64 << 20,  # and grows in large pieces
    _ARENA_MAX: 1,  # one heap for all threads: the others have a limit of 64 MiB
}


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, for its next buffers.

    For processes that do the same large work again and again on a CPU, such as training. The
    process stays as large as it ever was. To be called before JAX is first used, whose threads
    bring heaps of their own. Returns whether it took effect: only with glibc, so on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP.items())
