"""The C library's allocator while a model is trained.

glibc gives the memory of a large tensor back to the system as soon as it is freed, and the next tensor of that size is
mapped anew: zeroed page by page when it is first written. A training step on a CPU frees and allocates the same
gigabytes every time, an eighth of its time (docs/training.md).
"""

from __future__ import annotations

import ctypes
import sys

# parameters of mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees, for its next allocations. Nothing happens without glibc."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TOP_PAD, 256 << 20)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
