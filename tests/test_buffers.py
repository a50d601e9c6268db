"""Memory for keys and values is lent to one batch after another, and never to two at once."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imtx import Config, ImageTransformer, sample
from imtx.fast.buffers import LINE, Buffers, carve, size_of


def test_a_buffer_is_lent_again():
    buffers = Buffers()
    with buffers.lent([5000]) as (first,):
        address = first.ctypes.data
    with buffers.lent([4000]) as (again,):
        assert again.ctypes.data == address and again.size >= 4000


def test_two_borrowers_never_share():
    buffers = Buffers()

    def borrow(number: int) -> bool:
        sizes = random.Random(number).choices((1000, 2000, 3000), k=2)
        with buffers.lent(sizes) as lent:
            assert all(buffer.size >= size for buffer, size in zip(lent, sizes))
            for i, buffer in enumerate(lent):
                buffer[:] = (2 * number + i) % 256
            return all((buffer == (2 * number + i) % 256).all() for i, buffer in enumerate(lent))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(borrow, range(400)))


def test_a_borrower_that_fails_gives_back():
    buffers = Buffers()
    with pytest.raises(ValueError), buffers.lent([1000]) as (first,):
        address = first.ctypes.data
        raise ValueError
    with buffers.lent([1000]) as (again,):
        assert again.ctypes.data == address


def test_a_larger_buffer_replaces_a_smaller_one_and_no_more_than_some_are_kept():
    buffers = Buffers(kept=10_000)
    for size in range(1000, 9000, 1000):
        with buffers.lent([size]):
            pass
    assert [len(buffer) for buffer in buffers._free] == [8000]
    with buffers.lent([4000, 5000, 6000]):
        pass
    assert sum(map(len, buffers._free)) <= 10_000


def test_arrays_of_a_buffer_are_zeros_on_cache_lines_of_their_own():
    shapes = (3, 5), (0, 7), (1,), (2, 2, 16)
    buffer = np.full(size_of(*shapes) + 1, 255, np.uint8)[1:]  # begins somewhere, as any array may
    arrays = carve(buffer, *shapes)
    for number, (array, shape) in enumerate(zip(arrays, shapes)):
        assert array.shape == shape and array.dtype == np.float32 and not array.any()
        assert array.ctypes.data % LINE == 0 or not array.size
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which Linux alone has")
def test_memory_does_not_grow_with_the_batches_drawn():
    model = ImageTransformer(Config(query_block=64, memory_block=64, ffn=8)).eval()  # 6 MB of keys and values a picture

    def draw(images: int) -> None:
        pictures = sample(model, list(range(images)), engine="compiled", every=8)
        next(pictures)  # a visitor who leaves early

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024  # MB

    threads = [ThreadPoolExecutor(1) for _ in range(16)]  # each with an arena of its own for malloc
    threads[0].submit(draw, 8).result()
    before = resident()
    for number in range(64):
        threads[number % 16].submit(draw, random.Random(number).randint(1, 8)).result()
    assert resident() - before < 16
