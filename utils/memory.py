"""How the C library's allocator treats memory that is freed."""

import contextlib
import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep_freed() -> None:
    """Lets glibc keep what is freed for what comes next, rather than give it back to the system at once.

    The system clears memory page by page before it hands it out anew, which takes part of every training step on a CPU
    (docs/performance.md). Other libraries stay as they are, and so does glibc where MALLOC_* are set.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError):  # no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)
