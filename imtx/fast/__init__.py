"""Drawing with one compiled function for the whole step, on a CPU: the pictures of the PyTorch step, much sooner.

`arithmetic.py`, `draws.py`, `meeting.py` and `step.py` are what Numba compiles, once on a machine: the code is kept in the
user's cache. `weights.py` turns a model into the arrays that they work on. This file decides whether they can, and drives
them. Up to four images are drawn together (two with guidance, which has each of them twice), by two threads (`lanes.py`); a
larger batch is shared out over threads. Two visitors' requests do not wait for each other, as compiled code runs without
Python's lock.
"""

import logging
import math
import os
import pickle
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ..model import Context, ImageTransformer
from .buffers import Buffers
from .lanes import Lanes, drawing

IMAGES_A_GROUP = 4
PIXELS_A_CALL = 32  # after so many, Ctrl-C gets in, and `Lanes` decides anew
PIXELS_IN_FIRST_CALL = 4  # by one thread, to see whether two are faster

_log = logging.getLogger("imtx")
_packed = weakref.WeakKeyDictionary()  # model -> (a checksum of each of its weights, shape, weights)
_buffers = Buffers()
_compiled = set()  # dtypes of the matrices for which `warm` has been through
_unkept = []  # why code that was compiled could not be kept, for `obstacle`


def obstacle(model: ImageTransformer) -> str | None:
    """Why the compiled step cannot draw with this model; None if it can."""
    weight = model.head.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}, and compiled code runs on the CPU"
    if weight.dtype != torch.float32:
        return f"the model is in {str(weight.dtype).removeprefix('torch.')}, and compiled code works in float32"
    try:
        from numba import config

        from . import step  # noqa: F401
    except ImportError as error:
        return f"Numba cannot be imported ({error}); pip install numba"
    except (OSError, RuntimeError) as error:  # a library of Numba's that does not load; no folder that it could keep code in
        return f"Numba cannot compile here ({_first_line(error)}); NUMBA_CACHE_DIR names a folder that can be written to"
    if config.DISABLE_JIT:
        return "Numba is told not to compile; unset NUMBA_DISABLE_JIT"
    if _unkept and _pack(model)[1].qkv.dtype not in _compiled:
        return f"Numba cannot keep what it compiles ({_first_line(_unkept[0])}); NUMBA_CACHE_DIR names a folder with 10 MB to spare"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def warm(model: ImageTransformer) -> None:
    """Compiles what this model needs, or reads it from the cache: 20 to 40 s, or half a second.

    Code that has come to harm on the disk is made anew. Where the disk is full, code cannot be kept, and `obstacle` says so
    from then on.
    """
    try:
        _first_pixel(model)
    except (EOFError, pickle.UnpicklingError):  # of Numba, at files cut short: a machine went down as they were written
        from .compiling import forget

        forget()
        _log.warning("Compiled code in the cache was damaged. It is compiled anew.")
        _first_pixel(model)
    except OSError as error:
        _unkept.append(error)
        return
    _compiled.add(_pack(model)[1].qkv.dtype)


def _first_pixel(model: ImageTransformer) -> None:
    with torch.inference_mode():
        sources = torch.zeros(1, model.config.source_size, model.config.source_size, 3, dtype=torch.uint8)
        context = model.context(1, None, sources if model.config.source_size else None)
    uniforms = torch.zeros(1, model.config.positions, model.output.draws, dtype=torch.float64)
    pixels = np.zeros((1, model.config.sub_pixels), np.uint8)
    next(draw_pixels(model, context, uniforms, pixels, known=0, temperature=1.0, every=1))


def is_warm(model: ImageTransformer) -> bool:
    """Whether `warm` has been through with a model of this kind, so that no one has to wait for a compiler."""
    return obstacle(model) is None and _pack(model)[1].qkv.dtype in _compiled


def draw_pixels(
    model: ImageTransformer, context: Context, uniforms: Tensor, pixels: np.ndarray, *, known: int, temperature: float, every: int
) -> Iterator[int]:
    """Draws N images, after the first `known` pixels in generation order; yields how many are done, every so many pixels.

    uniforms: (N, P, draws a position) float64. pixels: (N, sub-pixels) uint8 in raster order with what is known; it holds
    what is drawn whenever this yields.
    """
    from .meeting import GONE
    from .step import advance
    from .weights import allocate, cache_size

    shape, weights = _pack(model)
    threads = _threads()
    # No more images at a time than share a weight once read: more would crowd out of the processor's cache what one step
    # of an image leaves there for the next.
    fours, shares = math.ceil(context.copies * len(pixels) / IMAGES_A_GROUP), min(len(pixels), threads)
    groups = np.array_split(np.arange(len(pixels)), max(fours, shares if shares > 2 else 1))  # two work on a single group
    parts = [slice(group[0], group[-1] + 1) for group in groups]
    with drawing(), _buffers.lent([cache_size(model, weights, context.copies * len(group)) for group in groups]) as lent:
        with torch.inference_mode():
            memory = [allocate(model, weights, context, uniforms, pixels, *each) for each in zip(parts, lent)]
        lanes = Lanes(min(threads, len(memory[0][1])), abandon=lambda: memory[0][0].arrived.fill(GONE))

        def draw_group(group: int, first: int, last: int, lane: int = 0, of: int = 1) -> None:
            state, scratch = memory[group]
            begin, end, given = first * channels, last * channels, known * channels
            advance(shape, weights, state, scratch[lane], lane, of, begin, end, given, temperature, context.guidance)

        channels, total, done = shape.channels, model.config.image_size**2, 0
        while done < total:
            due = known if done < known else min(known + ((done - known) // every + 1) * every, total)
            last = min(done + (PIXELS_A_CALL if done else PIXELS_IN_FIRST_CALL), due)
            if len(memory) == 1:
                lanes.run(partial(draw_group, 0, done, last), last - done)
            else:
                list(_pool(threads).map(draw_group, range(len(memory)), [done] * len(memory), [last] * len(memory)))
            done = last
            if done == due and done > known:
                np.concatenate([state.pixels[: len(state.uniforms)] for state, _ in memory], out=pixels)
                yield done


def _pack(model: ImageTransformer) -> tuple:
    """The model's arrays, made once, and again when its weights have changed."""
    from .weights import pack

    with torch.inference_mode():
        # Of all bytes: a weight's version would not tell what was written through `.data`. Not by PyTorch, whose loops would
        # wait in a forked process for threads that are not there.
        state = [zlib.crc32(np.ascontiguousarray(weight.detach().numpy())) for weight in model.parameters()]
        if model not in _packed or _packed[model][0] != state:
            _packed[model] = (state, *pack(model))
    return _packed[model][1:]


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """For all draws: new threads each time would leave memory behind."""
    return ThreadPoolExecutor(threads, thread_name_prefix="imtx")


def _after_fork() -> None:
    """A forked process has one thread: pools are empty there, and locks that others held would stay held."""
    global _buffers
    _buffers = Buffers()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    """As many as there are processors for this process, or OMP_NUM_THREADS if that is set, as PyTorch has it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else processors()


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
