"""On the CPU, memory that a training step frees stays with the process for the next step.

glibc gives large blocks back to the system as soon as they are free, and the system clears each page again when the
next step asks for it: tens of thousands of page faults a step for the activations of a ResNet-110.
"""

import ctypes

# Parameters of mallopt(3), which has no other interface.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MADV_POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; returns False where the C library is another one, and nothing happens.

    The process's size then stays at its peak, which is that of a training step anyway.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28))
    return all(mallopt(parameter, value) for parameter, value in settings)


def populate(address: int, size: int) -> bool:
    """Has the system provide the pages of a new memory mapping at once, instead of one by one when they are written to.

    Returns False, and nothing is lost, where the system does not know how.
    """
    try:
        madvise = ctypes.CDLL("libc.so.6").madvise
    except (OSError, AttributeError):
        return False
    return madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_WRITE) == 0
