"""Memory for keys and values is lent to one batch after another, and never to two at once."""

import gc
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imtx import Config, ImageTransformer, sample
from imtx.fast.buffers import HUGE, LINE, Buffers, carve, pages, size_of, together


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


def test_copies_lie_together_on_cache_lines_of_their_own():
    arrays = [np.arange(5), np.zeros((0, 3), np.uint16), np.ones((2, 3), np.float32).T, np.arange(40, dtype=np.uint16)]
    copies = together(arrays)
    for array, copy in zip(arrays, copies):
        assert copy.dtype == array.dtype and np.array_equal(copy, array) and copy.flags.c_contiguous
        assert copy.ctypes.data % LINE == 0
    copies[0][...] = -1
    assert all(np.array_equal(copy, array) for array, copy in zip(arrays[1:], copies[1:])) and arrays[0][1] == 1


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_memory_asks_for_huge_pages():
    memory = pages(5_000_000)
    assert memory.shape == (5_000_000,) and memory.ctypes.data % HUGE == 0 and not memory.any()
    flags, inside = None, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(number, 16) for number in found.groups())
            inside = first <= memory.ctypes.data < last
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags  # madvise(MADV_HUGEPAGE)


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
