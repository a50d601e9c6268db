"""Memory for weights, and for keys and values, which is lent to one batch after another.

A batch needs some megabytes for as long as it is drawn. Left to malloc, they stay in the arena of whichever thread asked, so
that a server grows with its requests; given back to the system and asked for again, their page faults cost up to a fifth of
the time in which a picture is drawn.
"""

import math
import mmap
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

LINE = 64  # bytes that a processor's cache reads at once; what begins elsewhere costs two reads a vector
HUGE = 2 * 2**20  # bytes of a huge page
KEPT = 256 * 2**20  # bytes at most that wait for the next batch


def pages(size: int) -> np.ndarray:
    """That many bytes, (size,) uint8 zeros, in huge pages where the system has them.

    What a step reads is about as large as a processor's second cache. In pages of 4 kB, which lie anywhere, some of it
    crowds out the rest: in huge ones a picture takes 4 to 23 % less time.
    """
    # Unless told, mmap shares what it maps with processes that are forked later.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    area = mmap.mmap(-1, (math.ceil(size / HUGE) + 1) * HUGE, **private)  # what nobody touches takes no memory
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a kernel that was built without them
            area.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(area, np.uint8)
    first = -memory.ctypes.data % HUGE
    return memory[first : first + size]


class Buffers:
    """Buffers of bytes that nobody works in at the moment."""

    def __init__(self, kept: int = KEPT):
        self.kept = kept
        self._free: list[np.ndarray] = []  # the smallest first
        self._returned: deque[np.ndarray] = deque()  # not yet among them
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, sizes: Sequence[int]) -> Iterator[list[np.ndarray]]:
        """A buffer (uint8) of at least that many bytes for each size; what is in it is left over from others.

        After an error, such as Ctrl-C, other threads may still work in them, so they are not lent again.
        """
        buffers = [self._take(size) for size in sizes]
        try:
            yield buffers
        except GeneratorExit:  # a visitor left, between two calls
            self._take_back(buffers)
            raise
        self._take_back(buffers)

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            self._tidy()
            for i, buffer in enumerate(self._free):
                if buffer.size >= size:
                    return self._free.pop(i)
            if self._free:
                self._free.pop(0)  # the larger one, below, will do for whatever this did
        return pages(size)

    def _take_back(self, buffers: list[np.ndarray]) -> None:
        # Never waits for the lock: the garbage collector may close a forgotten generator in the very thread that holds it.
        self._returned.extend(buffers)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def _tidy(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            if buffer.size <= self.kept:
                self._free.append(buffer)
        self._free.sort(key=len)
        while sum(map(len, self._free)) > self.kept:
            self._free.pop(0)


def together(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copies of arrays, one behind the other in `pages`, each with cache lines of its own."""
    memory, first, copies = pages(sum(_padded(array.nbytes) for array in arrays)), 0, []
    for array in arrays:
        copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        copies.append(copy)
        first += _padded(array.nbytes)
    return copies


def size_of(*shapes: tuple[int, ...]) -> int:
    """Bytes that float32 arrays of these shapes take in `carve`."""
    return sum(_padded(4 * math.prod(shape)) for shape in shapes) + LINE


def carve(buffer: np.ndarray, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """float32 arrays of zeros, one behind the other, each with cache lines of its own."""
    first, arrays = -buffer.ctypes.data % LINE, []
    for shape in shapes:
        array = buffer[first : first + 4 * math.prod(shape)].view(np.float32).reshape(shape)
        array[...] = 0
        arrays.append(array)
        first += _padded(4 * math.prod(shape))
    return arrays


def _padded(size: int) -> int:
    return size + LINE - size % LINE
