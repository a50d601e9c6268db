"""Memory that is freed stays with the process."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next step: elsewhere, nothing.

    Otherwise tensors of 32 MB and more are new memory each time, and the system fills each page of it with zeros first: half
    of the time of attention over 3,072 positions.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX, of malloc.h: nothing gets a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
