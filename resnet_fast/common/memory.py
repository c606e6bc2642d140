"""How the C library treats memory that a training step frees."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for this process instead of returning it to the system; other C libraries ignore it.

    A training step on a CPU frees and allocates the same gradients again. Returned, each of their pages is mapped and
    zeroed anew in every step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
