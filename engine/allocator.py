"""On the CPU, the process keeps the memory that a training step frees.

Otherwise glibc returns large blocks to the system, which clears each page again: tens of thousands of page faults a
step for a ResNet-110.
"""

import ctypes
from collections.abc import Callable

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MADV_POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory. Returns False with another C library.

    The process then stays at its peak size, which each step reaches anyway.
    """
    mallopt = _of_glibc("mallopt")
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28))
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in settings)


def populate(address: int, size: int) -> bool:
    """Ask for all pages of a new memory mapping at once. `size` is in bytes. Returns False where the system cannot."""
    madvise = _of_glibc("madvise")
    return madvise is not None and madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_WRITE) == 0


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
