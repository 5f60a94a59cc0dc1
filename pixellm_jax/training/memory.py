"""Memory of this process: keep freed buffers for reuse, and report the peak.

XLA's CPU client allocates the buffers of every call with malloc and frees them afterwards. By
default glibc returns large blocks to the system at once, so every training step faults in gigabytes
of fresh pages (measured in docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import resource
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import jax

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_ARENA_MAX = -8

_KEEP = {
    _MMAP_MAX: 0,  # large buffers come from the heap, too
    _TRIM_THRESHOLD: -1,  # the heap never shrinks
    _TOP_PAD: 64 << 20,  # and grows in large pieces
    _ARENA_MAX: 1,  # one heap for all threads: the others have a limit of 64 MiB
}


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, for reuse by later buffers.

    For processes that repeat the same large computation on a CPU, such as training. The process
    never shrinks below its peak size. Call it before the first JAX computation, whose threads
    create heaps of their own.

    Returns:
        Whether the setting took effect: only with glibc, hence only on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP.items())


def keep_freed_memory_on_cpu() -> bool:
    """Call `keep_freed_memory` if JAX is going to run on the CPU; return whether it took effect.

    JAX itself cannot be asked: that would start its threads, after which the setting has no effect.
    The CPU is expected where `JAX_PLATFORMS` says so, or where no accelerator plugin is installed.
    """
    config: Any = jax.config  # its flags are not typed
    platforms = config.jax_platforms
    if platforms:
        return platforms == "cpu" and keep_freed_memory()
    accelerated = entry_points(group="jax_plugins") or find_spec("libtpu")
    return not accelerated and keep_freed_memory()


def peak_memory_bytes() -> int:
    """Return the peak bytes in use on the first device, else of this process.

    The process counts where the device reports no statistics, as on a CPU.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if peak is not None:
        return int(peak)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else 1024 * kib
