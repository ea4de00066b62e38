"""Memory of the process on a CPU: huge pages, and freed memory that goes back to the operating system at once."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

from minit2v_kernels import cpu as kernels

from .stream import mapped_spans

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


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Moves tensors on the CPU into memory pages of 2 MiB, where Linux allows it. Addresses and values stay the same.

    Small tensors that lie side by side move together. Those that are mapped from files stay, because the system may
    read their files when it needs them. See `minit2v_kernels.cpu.use_huge_pages`.
    """
    storages = [x.untyped_storage() for x in tensors if x.is_cpu]
    if sys.platform != "linux" or sum(s.nbytes() for s in storages) < kernels.LARGE:
        return
    spans = mapped_spans()
    blocks: list[list[int]] = []  # first address and end of neighbours
    for first, end in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        if any(a <= first and end <= b for a, b in spans):
            continue
        if blocks and first <= blocks[-1][1] + mmap.PAGESIZE:
            blocks[-1][1] = max(blocks[-1][1], end)
        else:
            blocks.append([first, end])
    for first, end in blocks:
        kernels.use_huge_pages(first, end, now=True)
