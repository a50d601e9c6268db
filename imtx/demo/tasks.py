"""The demo's three tasks, as generators for gradio: checked input in, partial pictures and at last PNG files out."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import CheckpointError, find
from ..images import BICUBIC, MAX_ZOOM, NEAREST, area_means, enlarge, save_png, source_and_truth, square_crop
from ..model import ImageTransformer
from ..sampling import pixel_order, sample
from . import requests
from .canvas import Stream
from .gallery import read as read_gallery

FRAMES_A_SECOND = 12  # what a slow link still shows
LEAST_FRAMES = 16  # a picture, however fast it is drawn

GENERATOR, UPSCALER = "cifar10-dmol-1d", "faces-sr-1d"  # the bundled models, which drew the gallery

# What an endpoint yields: the canvas's value, the PNG files (at the end), the seed used.
Frames = Iterator[tuple[dict, list[str] | None, int]]


class Loaded:
    """A model for a task, or the reason why there is none: the rest of the demo goes on without it."""

    def __init__(self, name: str | Path):
        self.name, self._model = str(name), None
        self.error = self.public_error = ""  # for the log; for visitors, who need not know where files lie
        try:
            folder = find(name)
        except CheckpointError as error:
            self.error = self.public_error = str(error)
            return
        try:
            self._model = ImageTransformer.from_pretrained(folder)
        except CheckpointError as error:
            self.error = str(error)
            self.public_error = self.error.replace(f"{folder}/", "").replace(str(folder), folder.name)

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> ImageTransformer:
        if self._model is None:
            raise requests.refusal(f"The weights of this task are not loaded. {self.public_error}")
        return self._model

    def __str__(self) -> str:
        if self._model is None:
            return f"{self.name}: not loaded. {self.error}"
        return f"{self.name}, {sum(p.numel() for p in self._model.parameters()):,} parameters"


class Tasks:
    """generator: a class-conditional model; upscaler: a super-resolution model; examples: folder of example pictures."""

    def __init__(self, generator: Loaded, upscaler: Loaded, examples: Path):
        self.generator, self.upscaler, self.examples = generator, upscaler, examples

    # Parameter names are the API's.

    def generate(self, class_name, temperature, count, seed) -> Frames:
        """Draws 32x32 pictures of a class from nothing, pixel by pixel."""
        model = self.generator.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        classes = model.config.classes
        label = requests.label(class_name, classes, chance=seed)
        stream = generate_stream(model, count)
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature, labels=[label] * count if classes else None
        )
        about = f"{(*classes, 'no class')[label]}, seed {seed}"
        yield from _show(pictures, stream, about, seed)

    def complete(self, image, temperature, count, seed) -> Frames:
        """Keeps the top half of a picture and draws endings for it."""
        model = self.generator.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        truth = square_crop(requests.picture(image, self.examples), model.config.image_size)
        given = model.config.image_size**2 // 2
        stream = complete_stream(model, truth, count)
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature,
            given=torch.from_numpy(truth), given_pixels=given,
        )
        yield from _show(pictures, stream, f"seed {seed}", seed)

    def super_resolve(self, image, temperature, count, seed) -> Frames:
        """Draws 32x32 pictures that fit an 8x8 one. Any other picture becomes 8x8 by area means of its centre crop."""
        model = self.upscaler.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        sizes = (model.config.source_size, model.config.image_size)
        source, truth = source_and_truth(requests.picture(image, self.examples), *sizes)
        stream = upscale_stream(model, source, truth, count)
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature, sources=torch.from_numpy(source)
        )
        yield from _show(pictures, stream, f"seed {seed}", seed)

    def ready(self, gallery: Path) -> dict[str, dict | None]:
        """For each task a finished run from `gallery`, as the canvas's value; None if another model runs than drew it."""
        values = dict.fromkeys(("generate", "complete", "super-resolve"))
        if self.generator.loaded and self.generator.name == GENERATOR:
            pictures, text = read_gallery(gallery, "generate")
            values["generate"] = _finished(generate_stream(self.generator.model, len(pictures)), pictures, text)
            (truth, *pictures), text = read_gallery(gallery, "complete")
            stream = complete_stream(self.generator.model, truth, len(pictures))
            values["complete"] = _finished(stream, np.stack(pictures), text)
        if self.upscaler.loaded and self.upscaler.name == UPSCALER:
            (truth, *pictures), text = read_gallery(gallery, "super-resolve")
            factor = len(truth) // self.upscaler.model.config.source_size
            stream = upscale_stream(self.upscaler.model, area_means(truth, factor), truth, len(pictures))
            values["super-resolve"] = _finished(stream, np.stack(pictures), text)
        return values

    def frame(self, picture, zoom, x, y) -> Iterator[str | None]:
        """The part of a picture that is super-resolved, as a PNG file; one of the source's size stays as it is."""
        if picture is None or not self.upscaler.loaded:  # in that case, Run says why
            yield None
            return
        config, upright = self.upscaler.model.config, requests.picture(picture, self.examples)
        zoom = requests.between(zoom, 1, MAX_ZOOM, "Zoom")
        x, y = (requests.between(share, 0, 1, "The place of the crop") for share in (x, y))
        if upright.size == (config.source_size, config.source_size):
            pixels = np.array(upright)
        else:
            pixels = square_crop(upright, config.image_size, zoom, x, y)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "crop.png"
            save_png(pixels, path)
            yield str(path)  # gradio copies the file before it asks for more


def generate_stream(model: ImageTransformer, count: int) -> Stream:
    return Stream(count, model.config.image_size, order=_order(model))


def complete_stream(model: ImageTransformer, truth: np.ndarray, count: int) -> Stream:
    size = model.config.image_size
    return Stream(
        count, size, base=truth, given=size**2 // 2, order=_order(model),
        reference=[("Given", truth[: size // 2]), ("Truth", truth)],
    )


def upscale_stream(model: ImageTransformer, source: np.ndarray, truth: np.ndarray | None, count: int) -> Stream:
    size = model.config.image_size
    factor = size // model.config.source_size
    side = model.config.source_size
    reference = [(f"{side}x{side} input", source), ("Bicubic", enlarge(source, factor, BICUBIC))]
    if truth is not None:
        reference.append(("Truth", truth))
    return Stream(count, size, base=enlarge(source, factor, NEAREST), reference=reference, order=_order(model))


def _finished(stream: Stream, pictures: np.ndarray, text: str) -> dict:
    stream.append(pictures, len(stream.order))
    return stream.value(text)


def _order(model: ImageTransformer) -> list[int] | None:
    """None where pixels come in raster order: then it need not be sent."""
    order = pixel_order(model).tolist()
    return None if order == sorted(order) else order


def _show(pictures, stream: Stream, about: str, seed: int) -> Frames:
    """Yields what is drawn so far, at most FRAMES_A_SECOND times a second but LEAST_FRAMES times a picture at least."""
    yield stream.value(f"Drawing {about} ..."), None, seed
    started = shown = time.monotonic()
    first = stream.done
    for snapshot in pictures:
        now = time.monotonic()
        enough = max((snapshot.total - first) // LEAST_FRAMES, 1)
        due = now - shown >= 1 / FRAMES_A_SECOND or snapshot.done - stream.done >= enough
        if due and first < snapshot.done < snapshot.total:
            stream.append(snapshot.pixels.numpy(), snapshot.done)
            rate = (snapshot.done - first) / (now - started)
            yield stream.value(f"Pixel {snapshot.done} of {snapshot.total}, {rate:.0f} pixels a second"), None, seed
            shown = now
    seconds = time.monotonic() - started
    stream.append(snapshot.pixels.numpy(), snapshot.total)
    rate = (snapshot.total - first) / seconds
    text = f"{snapshot.total} of {snapshot.total} pixels in {seconds:.1f} s, {rate:.0f} a second: {about}"
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, pixels in enumerate(snapshot.pixels.numpy(), start=1):
            files.append(str(Path(folder) / f"sample-{i}.png"))
            save_png(pixels, Path(files[-1]))
        yield stream.value(text), files, seed  # gradio copies the files before it asks for more
