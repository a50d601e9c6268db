"""What a step of the compiled sampler cannot do without, and how fast this machine is at that: what sampling.py divides by.

Bytes a step: the weights, read once for all images, in the dtype of the compiled step's arrays (imtx/fast/weights.py), but
for tables of which a step reads one row; and for each image the float32 keys and values of all layers that a step sees,
which are those of its memory block, of its query block up to itself and, in super-resolution, of the source: the mean over
the steps. Copies into a window, activations and what is written are left out.

FLOPs a step: two for each number of a matrix and image, and four for each feature of each key that is seen (a product with
the key, one with the value). Norms, softmax and the draw are left out.

Read bandwidth: float32 numbers of just as many bytes, added up by compiled code again and again, so that they come from
the caches that a step's come from; each thread adds up a part of its own. Rate: torch's float32 products of square
matrices, each thread with one of its own. A rate that is too low would flatter the sampler, so the best of many counts, and
any that fewer threads or, of bandwidth, a larger working set has reached.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numba import njit

from imtx import ImageTransformer
from imtx.fast.weights import PAPER_LEVELS, pack
from imtx.layout import Layout

TABLES = {"order", "memory", "memory_length", "cos", "sin", "seen", "cells", "place"}
MATRICES = ("stem", "predictor", "qkv", "out", "source_q", "source_out", "up", "down", "head")
SIDE = 384  # of the matrices: a product takes a millisecond, which other work on the machine is likely to spare
PASS_BYTES = 100e6  # read in one measurement, at least: a millisecond, beside which starting the threads is nothing


@dataclass(frozen=True)
class Step:
    """What a step of `images` images takes."""

    weight_bytes: int
    cache_bytes: float
    flops: float
    dtype: str  # of the matrices in the blocks

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


def keys_seen(layout: Layout) -> float:
    """Mean over the steps: the memory block, and the query block up to the step itself."""
    memory = sum(len(layout.memory_steps(block)) for block in range(layout.blocks)) / layout.blocks
    return memory + (layout.query_block + 1) / 2


def step_of(model: ImageTransformer, images: int) -> Step:
    config, (shape, weights) = model.config, pack(model)
    rows = TABLES | {"stem"} if shape.embedding == PAPER_LEVELS else TABLES  # a colour's row of a table
    features = config.layers * config.heads * config.head_width * (keys_seen(model.layout) + config.source_size**2)
    multiplied = sum(getattr(weights, name).size for name in MATRICES if name not in rows)
    return Step(
        weight_bytes=sum(array.nbytes for name, array in weights._asdict().items() if name not in rows),
        cache_bytes=images * 2 * 4 * features,
        flops=images * (2 * multiplied + 4 * features),
        dtype="bf16" if weights.qkv.dtype == np.uint16 else "fp32",
    )


@njit(nogil=True, fastmath=True)
def _add_up(numbers, passes):
    total = np.float32(0)
    for _ in range(passes):
        for i in range(len(numbers)):
            total += numbers[i]
    return total


@dataclass
class Machine:
    """The best rates seen so far. What is expected once is measured anew by every `measure`."""

    bandwidths: dict[tuple[int, int], float] = field(default_factory=dict)  # (bytes, threads) -> bytes a second
    rates: dict[int, float] = field(default_factory=dict)  # threads -> FLOP/s

    def expect(self, size: float, threads: int) -> None:
        self.bandwidths.setdefault((int(size), threads), 0.0)
        self.rates.setdefault(threads, 0.0)

    def measure(self, seconds: float = 0.1) -> None:
        """Bandwidths for so long each, rates for twice that: a product of matrices is the longer piece of work."""
        for size, threads in self.bandwidths:
            numbers = [np.ones(size // 4 // threads, np.float32) for _ in range(threads)]
            passes = 1 + int(PASS_BYTES // size)
            rate = _best(lambda part: _add_up(part, passes), numbers, passes * sum(part.nbytes for part in numbers), seconds)
            self.bandwidths[size, threads] = max(self.bandwidths[size, threads], rate)
        for threads in self.rates:
            matrices = [torch.randn(3, SIDE, SIDE) for _ in range(threads)]
            rate = _best(lambda three: torch.mm(three[0], three[1], out=three[2]), matrices, threads * 2 * SIDE**3, 2 * seconds)
            self.rates[threads] = max(self.rates[threads], rate)

    def bandwidth(self, size: float, threads: int) -> float:
        """Of so many bytes and threads. Fewer threads or more bytes are no faster, unless their turn was less disturbed."""
        return max(rate for (n, t), rate in self.bandwidths.items() if n >= int(size) and t <= threads)

    def rate(self, threads: int) -> float:
        return max(rate for t, rate in self.rates.items() if t <= threads)

    def floor(self, step: Step, threads: int) -> float:
        """Seconds below which a step cannot be: reading or multiplying, whichever takes longer."""
        return max(step.bytes / self.bandwidth(step.bytes, threads), step.flops / self.rate(threads))


def _best(work: Callable, parts: list, amount: float, seconds: float) -> float:
    """The most a second of `amount`, which is what `work` does for all parts together, each in a thread of its own."""
    best, end = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:  # MKL counts by thread
        list(pool.map(work, parts))  # compiled, and in the caches as far as it fits
        while best == 0.0 or time.perf_counter() < end:
            begin = time.perf_counter()
            list(pool.map(work, parts))
            best = max(best, amount / (time.perf_counter() - begin))
    return best
