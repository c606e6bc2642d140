"""Reuse of memory that a training step on a CPU frees."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for this process instead of returning it to the system; other C libraries ignore it.

    A training step on a CPU frees its gradients and allocates them again. If their memory were returned, every step
    would map and zero each page again.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
