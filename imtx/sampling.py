"""Drawing images position by position through the cache, as a generator that can be watched and stopped.

Three engines draw the same pictures: the PyTorch step of imtx/model.py, which is the one to read, and two to wait for: a
compiled function for the whole step on a CPU (imtx/fast), and a CUDA graph of it on a GPU (imtx/graph.py).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from . import fast, graph
from .attention import Cache
from .model import Context, ImageTransformer

SEEDS = 2**32  # a seed is an integer in 0..SEEDS-1
MOST_GUIDANCE = 20
HOTTEST = 1e30  # temperature; beyond it, and below 1 / HOTTEST, float32 overflows
ENGINES = ("compiled", "graph", "eager")

_log = logging.getLogger("imtx")
_told = set()  # reasons for the eager engine that the log has


@dataclass(frozen=True)
class Snapshot:
    """A batch of growing pictures."""

    pixels: Tensor  # (N, h, w, 3) uint8 on the CPU, a copy; 0 where nothing is drawn yet
    done: int  # pixels that are complete, the given ones among them; they are the first in `pixel_order`
    total: int  # h w


def pixel_order(model: ImageTransformer) -> Tensor:
    """(h w,) int64: raster indices of the pixels in the order in which they are drawn."""
    channels = model.config.channels
    return (model.layout.order // channels)[::channels]


def whole_rows(model: ImageTransformer, rows: int) -> int:
    """The most rows, at most `rows`, that `pixel_order` completes before it begins any below: 0 if it completes none so.

    What a completion can keep. In raster order that is `rows` itself; with a 2D layout, whole rows of blocks.
    """
    size = model.config.image_size
    rows = min(rows, size)
    lowest = (pixel_order(model) // size).cummax(dim=0).values  # (h w,): the lowest row that each step has reached
    return max((n for n in range(1, rows + 1) if lowest[n * size - 1] < n), default=0)


def noise(model: ImageTransformer, seeds: Sequence[int]) -> Tensor:
    """All uniform numbers that the images will ever use: (N, P, draws a position), float64.

    Each image has a generator of its own, so what it looks like does not depend on the batch that it is drawn in.
    """
    shape = (model.config.positions, model.output.draws)
    return torch.stack(
        [torch.rand(shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64) for seed in seeds]
    )


def sample(
    model: ImageTransformer,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    guidance: float = 1.0,
    labels: Sequence[int] | None = None,
    sources: Tensor | None = None,
    given: Tensor | None = None,
    given_pixels: int = 0,
    every: int = 1,
    engine: str | None = None,
) -> Iterator[Snapshot]:
    """Draws one image a seed, all at once, and yields them as they grow (paper section 4, temperature included).

    seeds: N integers in 0..2^32-1; the same seed and conditions give the same image.
    temperature: 1e-30 to 1e30; below 1 is tamer than the model's distribution, 1 is that distribution.
    guidance: 0 to 20; how far the class is followed. 1 is the model's distribution, above it pictures look more like their
        class; any other value takes two steps' work a step. (Classifier-free guidance, Ho and Salimans, 2022; not in the
        paper. Each step goes on from what it would be without a class to what it is with one, and beyond.)
    labels: N class indices, for a model with classes; None = no class.
    sources: (s, s, 3) or (N, s, s, 3) uint8, for a super-resolution model.
    given: (h, w, 3) or (N, h, w, 3) uint8, of which the first `given_pixels` in `pixel_order` are kept.
    every: pixels drawn between two snapshots; the finished images come in any case.
    engine: "compiled", "graph" (on a CUDA device; not run on one yet, and so nobody's default), or "eager" for PyTorch; None
        takes the compiled one where it can run, which is a float32 model on a CPU, and the log says once why not. It is
        compiled when it is first used on a machine: 20 to 40 s.

    Closing the generator stops the work at once. Raises ValueError, when called, for arguments that the model cannot take.
    """
    config, device, size = model.config, model.head.weight.device, model.config.image_size
    if not isinstance(seeds, Iterable) or not (seeds := list(seeds)) or not all(_is_whole(n, 0, SEEDS - 1) for n in seeds):
        raise ValueError(f"seeds must be one or more integers in 0..{SEEDS - 1}, got {seeds}.")
    images = len(seeds)
    if not isinstance(temperature, Real) or not 1 / HOTTEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature must be a number from {1 / HOTTEST:g} to {HOTTEST:g}, got {temperature!r}.")
    if not isinstance(guidance, Real) or not 0 <= guidance <= MOST_GUIDANCE:
        raise ValueError(f"guidance must be a number from 0 to {MOST_GUIDANCE}, got {guidance!r}.")
    if not _is_whole(given_pixels, 0, size**2) or (given is None) != (given_pixels == 0):
        raise ValueError(
            f"given_pixels must be a whole number in 1..{size**2} with a given picture, 0 without; got {given_pixels!r} "
            f"{'without' if given is None else 'with'} one."
        )
    if not _is_whole(every, 1, size**2):
        raise ValueError(f"every must be a whole number in 1..{size**2}, got {every!r}.")
    if engine not in (None, *ENGINES):
        raise ValueError(f"engine must be {' or '.join(map(repr, ENGINES))} or None, got {engine!r}.")
    if model.training:
        raise ValueError("The model is in training mode, where dropout disturbs what is drawn: call model.eval() first.")
    if labels is not None:
        if not config.classes:
            raise ValueError("This model has no classes: leave labels out.")
        labels = list(labels) if isinstance(labels, Iterable) else labels
        if not isinstance(labels, list) or not all(_is_whole(label, 0, len(config.classes)) for label in labels):
            raise ValueError(f"labels must be class indices in 0..{len(config.classes)}, the last for no class; got {labels!r}.")
        if len(labels) != images:
            raise ValueError(f"labels must be one a seed, {images} of them, got {len(labels)}.")
        labels = torch.tensor([int(label) for label in labels], device=device)
    if sources is not None and config.source_size:
        sources = _batch(sources, images, config.source_size, "sources", device)
    if given is not None:
        given = _batch(given, images, size, "given", device)
        model.check_levels("given", given)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        context = model.context(images, labels, sources, float(guidance))
    engine = _engine(model, engine)
    steps = _compiled if engine == "compiled" else partial(_pytorch, engine)
    return steps(model, context, noise(model, seeds).to(device), float(temperature), given, given_pixels, every)


def _engine(model: ImageTransformer, asked: str | None) -> str:
    if asked == "eager":
        return "eager"
    device = model.head.weight.device
    if asked == "graph" and device.type != "cuda":
        raise ValueError(f"The graph engine needs a CUDA device, and the model is on {device}. Leave engine out.")
    if asked == "graph":
        return "graph"
    obstacle = fast.obstacle(model)
    if obstacle is None and not fast.is_warm(model):
        fast.warm(model)
        obstacle = fast.obstacle(model)  # code that could not be kept is one
    if obstacle is None:
        return "compiled"
    if asked == "compiled":
        raise ValueError(f"The compiled engine cannot draw: {obstacle}. Leave engine out.")
    if obstacle not in _told:
        _told.add(obstacle)
        _log.warning("Drawing with PyTorch, which takes longer: %s.", obstacle)
    return "eager"


def _compiled(
    model: ImageTransformer, context: Context, uniforms: Tensor, temperature: float, given: Tensor | None, given_pixels: int,
    every: int,
) -> Iterator[Snapshot]:
    size, images = model.config.image_size, len(uniforms)
    pixels = np.zeros((images, size * size * 3), np.uint8)  # raster order
    if given is not None:
        known = _sub_pixels(pixel_order(model)[:given_pixels])
        pixels[:, known] = given.flatten(1)[:, known]

    def snapshot(done: int) -> Snapshot:
        return Snapshot(torch.from_numpy(pixels.copy()).view(images, size, size, 3), done, size**2)

    if given_pixels:
        yield snapshot(given_pixels)
    for done in fast.draw_pixels(model, context, uniforms, pixels, known=given_pixels, temperature=temperature, every=every):
        yield snapshot(done)


@torch.inference_mode(False)  # for captures, see CudaStep
@torch.no_grad()
def _pytorch(
    engine: str, model: ImageTransformer, context: Context, uniforms: Tensor, temperature: float, given: Tensor | None,
    given_pixels: int, every: int,
) -> Iterator[Snapshot]:
    """uniforms: (N, P, draws a position); given: (N, h, w, 3) or None."""
    config, device, size = model.config, uniforms.device, model.config.image_size
    images = len(uniforms)
    rows = context.copies * images
    pixels = torch.zeros(rows, size * size * 3, dtype=torch.uint8, device=device)  # raster order
    caches = model.caches(rows)
    start = given_pixels * config.channels
    if given is not None:
        known = model.order[:start] if config.channels == 3 else _sub_pixels(model.order[:start])
        pixels[:, known] = given.flatten(1)[:, known].repeat(context.copies, 1)
        with torch.autocast(device.type, enabled=False):
            model.parallel(pixels.view(rows, size, size, 3), context, caches)  # one forward fills the caches with the given part

    snapshot_shape = (images, size, size, 3)
    if given_pixels:
        yield Snapshot(pixels[:images].view(snapshot_shape).cpu().clone(), given_pixels, size**2)
    drawing = (model, context, caches, uniforms, pixels, temperature)
    advance = graph.CudaStep(*drawing, start).advance if engine == "graph" else partial(_eager_step, *drawing)
    for step in range(start, config.positions):
        advance(step)
        done = (step + 1) // config.channels
        if (step + 1) % config.channels == 0 and ((done - given_pixels) % every == 0 or done == size**2):
            yield Snapshot(pixels[:images].view(snapshot_shape).cpu().clone(), done, size**2)


@torch.inference_mode()  # on a CPU a sixth sooner than without gradients alone
def _eager_step(
    model: ImageTransformer, context: Context, caches: list[Cache], uniforms: Tensor, pixels: Tensor, temperature: float,
    step: int,
) -> None:
    with torch.autocast(pixels.device.type, enabled=False):  # all engines draw the same, in whatever block of the caller's
        params = model.step(pixels, context, caches, step)  # (N, output parameters)
        colours = model.output.draw(model.output.temper(params, temperature), uniforms[:, step])  # (N, width)
    first = int(model.layout.order[step]) * colours.shape[1]  # width: sub-pixels a position
    pixels[:, first : first + colours.shape[1]] = colours.repeat(context.copies, 1)


def draw(model: ImageTransformer, seeds: Sequence[int], **conditions) -> Tensor:
    """`sample` to its end: (N, h, w, 3) uint8. conditions: `sample`'s arguments but for `every`. Raises ValueError.

    All N are drawn at once, with the keys and values of each in memory: 15 MB a picture of the bundled cifar10-dmol-1d, twice
    that with guidance. Thousands are for train/sample.py, which draws them in turns.
    """
    for snapshot in sample(model, seeds, every=model.config.image_size**2, **conditions):
        pass
    return snapshot.pixels


def _sub_pixels(pixel: Tensor) -> Tensor:
    """(n,) pixels -> (3 n,) their sub-pixels."""
    return (pixel[:, None] * 3 + torch.arange(3, device=pixel.device)).flatten()


def _is_whole(value, low: int, high: int) -> bool:
    """Whether it is an integer of Python, NumPy or torch in that range."""
    value = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    return isinstance(value, Integral) and low <= value <= high


def _batch(pictures: Tensor, images: int, size: int, name: str, device: torch.device) -> Tensor:
    """One picture for all, or one each, tensor or array -> (N, size, size, 3)."""
    if not isinstance(pictures, (Tensor, np.ndarray)):
        raise ValueError(f"{name} must be a uint8 tensor or array, got {type(pictures).__name__}.")
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures.copy())  # pictures opened by Pillow are read-only, of which PyTorch warns
    if pictures.dtype != torch.uint8 or pictures.shape not in ((size, size, 3), (images, size, size, 3)):
        raise ValueError(
            f"{name} must be uint8 of shape {(size, size, 3)} or {(images, size, size, 3)}, "
            f"got {pictures.dtype} {tuple(pictures.shape)}."
        )
    return pictures.to(device).expand(images, size, size, 3)
