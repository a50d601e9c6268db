"""A picture, or a few together, by one thread or by two at once, whichever is faster at the time; they are the same."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

CALLS_OF_REST = 8  # with one thread, where two have turned out slower, until they are tried again


def _begin() -> None:
    global _lock, _pictures, _other_lane
    _lock = threading.Lock()
    _pictures = 0  # pictures, or batches of them, that are being drawn in this process
    _other_lane = ThreadPoolExecutor(1, thread_name_prefix="imtx-lane")


_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)  # a forked process has one thread, whatever its parent's pools say


@contextmanager
def drawing() -> Iterator[None]:
    """Around all calls for a picture, or for a batch. Two lanes work only where no other is being drawn."""
    global _pictures
    with _lock:
        _pictures += 1
    try:
        yield
    finally:
        with _lock:
            _pictures -= 1


class Lanes:
    """Runs the calls for a picture or a few, and learns from how long they take.

    Two threads that each have a processor are nearly twice as fast as one. Where one of them has to wait for its turn, the
    other waits for it at every meeting, and one thread alone does better: so it is while someone else's picture is drawn.
    """

    def __init__(self, most: int, abandon: Callable[[], None]):
        """most: threads that may work on the picture, 1 or 2. abandon: has a thread that waits for the other go on alone."""
        self.most, self.abandon = most, abandon
        self.rest = 1  # calls with one thread before two are tried: to know its speed
        self.one_takes = 0.0  # seconds a pixel, when last measured

    def run(self, work: Callable[[int, int], None], pixels: int) -> None:
        """Calls `work(lane, lanes)`, which draws so many pixels, in one thread, or in two at once."""
        begin = time.perf_counter()
        two = self.most > 1 and not self.rest and _pictures == 1
        if two:
            try:
                other = _other_lane.submit(work, 1, 2)
                work(0, 2)
                other.result()
            except BaseException:
                # Ctrl-C may come before this thread has begun, and the other would wait for it for ever.
                self.abandon()
                raise
        else:
            work(0, 1)
        seconds = (time.perf_counter() - begin) / pixels
        if not two:
            self.one_takes, self.rest = seconds, max(self.rest - 1, 0)
        elif seconds > self.one_takes:
            self.rest = CALLS_OF_REST
