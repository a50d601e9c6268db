"""Memory for keys and values is lent to one batch after another, and never to two at once."""

import gc
import os
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


def test_a_visitor_who_leaves_gives_back_and_after_an_error_nothing_is_lent_again():
    buffers, addresses = Buffers(), []

    def visit():
        with buffers.lent([1000]) as (buffer,):
            addresses.append(buffer.ctypes.data)
            yield

    visitor = visit()
    next(visitor)
    visitor.close()
    with pytest.raises(KeyboardInterrupt), buffers.lent([1000]) as (again,):  # a thread may still work in it
        assert again.ctypes.data == addresses[0]
        raise KeyboardInterrupt
    with buffers.lent([1000]) as (other,):
        assert other is not again and not buffers._free


def test_a_buffer_comes_back_while_another_is_taken():
    """The garbage collector closes forgotten generators wherever it runs, and so in the thread that holds the lock."""
    buffers = Buffers()
    visitor = buffers.lent([1000])
    (buffer,) = visitor.__enter__()
    with buffers._lock:
        visitor.__exit__(None, None, None)  # does not wait
    with buffers.lent([1000]) as (again,):
        assert again is buffer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_works_in_memory_of_its_own():
    with Buffers().lent([1000]) as (buffer,):
        buffer[:] = 1
        child = os.fork()
        if not child:
            buffer[:] = 2
            os._exit(0)
        os.waitpid(child, 0)
        assert (buffer == 1).all()


def test_a_larger_buffer_replaces_a_smaller_one_and_no_more_than_some_are_kept():
    buffers = Buffers(kept=10_000)
    for size in range(1000, 9000, 1000):
        with buffers.lent([size]):
            pass
    assert [len(buffer) for buffer in buffers._free] == [8000]
    with buffers.lent([20_000]):  # is not kept, and drives no other out
        pass
    with buffers.lent([500]):
        assert not buffers._free  # it got the one of 8,000, as the next does
    with buffers.lent([4000, 5000, 6000]):
        pass
    assert 0 < sum(map(len, buffers._free)) <= 10_000


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
