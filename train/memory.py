"""Memory that is freed stays with the process."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next step: elsewhere, nothing.

    Otherwise much of a step's memory is new each time, and the system fills each page of it with zeros first: a fifth of the
    time of a training step. Peak memory stays the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX, of malloc.h: nothing gets a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
