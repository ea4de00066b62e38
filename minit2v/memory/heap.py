"""Memory of the process on a CPU: freed memory goes back to the operating system at once."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 64 * 1024  # bytes


def return_freed_memory() -> bool:
    """From now on, this process gives every freed block of memory above 64 KiB back to the system at once.

    By default, the C library glibc keeps freed blocks of up to 32 MiB, to use them again. Blocks of other sizes do not
    fit into them, so the process grows beyond its live tensors. Without kept blocks, the system must clear new memory
    for each large tensor, which takes time. This holds until the process ends. See mallopt(3).

    Returns False, and changes nothing, if the C library has no such setting (macOS, Windows, musl).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))
