"""The demo's three tasks, as generators for gradio: checked input in, partial pictures and at last PNG files out."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
import torch

from ..images import BICUBIC, MAX_ZOOM, NEAREST, area_means, enlarge, save_png, source_and_truth, square_crop
from ..model import ImageTransformer
from ..sampling import pixel_order, sample
from . import requests
from .canvas import Stream
from .gallery import read as read_gallery
from .models import Installed, kept_rows

FRAMES_A_SECOND = 12  # what a slow link still shows
LEAST_FRAMES = 16  # with a part of a picture, however fast it is drawn
LOOKS = 128  # at the clock, while a picture is drawn

# What an endpoint yields: the canvas's value, the PNG files (at the end), the seed used.
Frames = Iterator[tuple[dict, list[str] | None, int]]


class Tasks:
    """generators, upscalers: the models of a task by name, its default first; examples: folder of example pictures."""

    def __init__(self, generators: dict[str, Installed], upscalers: dict[str, Installed], examples: Path):
        self.generators, self.upscalers, self.examples = generators, upscalers, examples

    # Parameter names are the API's.

    def generate(self, class_name, temperature, count, seed, model, guidance) -> Frames:
        """Draws pictures of a class from nothing, pixel by pixel."""
        chosen = requests.one_of(self.generators, model)
        model = chosen.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        condition, about = _condition(model, class_name, guidance, count, seed)
        stream = generate_stream(model, count, _captions(seed, count))
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature, every=_every(stream.size), engine=chosen.engine,
            **condition,
        )
        yield from _show(pictures, stream, about, seed)

    def complete(self, image, temperature, count, seed, model, class_name, guidance) -> Frames:
        """Keeps the top half of a picture, or what of it the model draws first, and draws endings for it."""
        chosen = requests.one_of(self.generators, model)
        model = chosen.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        condition, about = _condition(model, class_name, guidance, count, seed)
        truth = square_crop(requests.picture(image, self.examples), model.config.image_size)
        if not kept_rows(model):
            raise requests.refusal(chosen.about_completing)
        stream = complete_stream(model, truth, count, _captions(seed, count))
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature, given=torch.from_numpy(truth),
            given_pixels=stream.done, every=_every(stream.size), engine=chosen.engine, **condition,
        )
        yield from _show(pictures, stream, about, seed)

    def super_resolve(self, image, temperature, count, seed, model) -> Frames:
        """Draws pictures of 32x32 that fit one of 8x8. Any other becomes 8x8 by area means of its centre crop."""
        chosen = requests.one_of(self.upscalers, model)
        model = chosen.model
        temperature, count, seed = requests.temperature(temperature), requests.count(count), requests.seed(seed)
        sizes = (model.config.source_size, model.config.image_size)
        source, truth = source_and_truth(requests.picture(image, self.examples), *sizes)
        stream = upscale_stream(model, source, truth, count, _captions(seed, count))
        pictures = sample(
            model, requests.seeds(seed, count), temperature=temperature, sources=torch.from_numpy(source),
            every=_every(stream.size), engine=chosen.engine,
        )
        yield from _show(pictures, stream, f"seed {seed}", seed)

    # What follows a choice in a "Model" dropdown: the line under it, and what else on the page depends on the model.

    def choose_generator(self, model, class_name) -> tuple[dict, dict, dict]:
        """The classes are the new model's; the one that was chosen stays if it is among them."""
        chosen = requests.one_of(self.generators, model)
        names = requests.choices(chosen.classes)
        return gr.update(info=chosen.about), *_classes(names, class_name if class_name in names else names[0])

    def choose_completer(self, model, class_name) -> tuple[dict, dict, dict, str]:
        chosen = requests.one_of(self.generators, model)
        names = requests.choices(chosen.classes)
        classes = _classes(names, class_name if class_name in names else requests.NO_CLASS)
        return gr.update(info=chosen.about), *classes, chosen.about_completing

    def class_of(self, image, model, class_name, of_example) -> tuple[str, str]:
        """The class for a new picture to complete, and whether it is an example's ("" if not).

        An example comes with its class, if the model knows it, and takes it away again; what the visitor chose stays for
        pictures of their own. of_example: the class that the picture before came with.
        """
        name = requests.example(image, self.examples) if image is not None else None
        if name is not None:
            name = name if name in requests.one_of(self.generators, model).classes else requests.NO_CLASS
            return name, name
        return requests.NO_CLASS if class_name == of_example else class_name, ""

    def choose_upscaler(self, model) -> dict:
        return gr.update(info=requests.one_of(self.upscalers, model).about)

    def ready(self, gallery: Path) -> dict[str, dict | None]:
        """For each task a finished run from `gallery`, as the canvas's value; None if it starts with another model."""
        values = dict.fromkeys(("generate", "complete", "super-resolve"))
        generator, upscaler = (next(iter(models.values())) for models in (self.generators, self.upscalers))
        if generator.drew_the_gallery and generator.load():
            pictures, text, captions = read_gallery(gallery, "generate")
            values["generate"] = _finished(generate_stream(generator.model, len(pictures), captions), pictures, text)
            (truth, *pictures), text, captions = read_gallery(gallery, "complete")
            stream = complete_stream(generator.model, truth, len(pictures), captions)
            values["complete"] = _finished(stream, np.stack(pictures), text)
        if upscaler.drew_the_gallery and upscaler.load():
            (truth, *pictures), text, captions = read_gallery(gallery, "super-resolve")
            factor = len(truth) // upscaler.model.config.source_size
            stream = upscale_stream(upscaler.model, area_means(truth, factor), truth, len(pictures), captions)
            values["super-resolve"] = _finished(stream, np.stack(pictures), text)
        return values

    def frame(self, picture, zoom, x, y, model) -> Iterator[dict]:
        """The part of a picture that is super-resolved, as a PNG file; one of the source's size stays as it is."""
        config = requests.one_of(self.upscalers, model).config
        if config is None:  # the line under the dropdown says why, and so does Run
            yield gr.update(value=None)
            return
        label = f"What becomes {config.source_size}x{config.source_size}"
        if picture is None:
            yield gr.update(value=None, label=label)
            return
        try:
            upright = requests.picture(picture, self.examples)
        except gr.Error:
            yield gr.update(value=None, label=label)  # not the one before: Run would take it
            raise
        zoom = requests.between(zoom, 1, MAX_ZOOM, "Zoom")
        x, y = (requests.between(share, 0, 1, "The place of the crop") for share in (x, y))
        if upright.size == (config.source_size, config.source_size):
            pixels = np.array(upright)
        else:
            pixels = square_crop(upright, config.image_size, zoom, x, y)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "crop.png"
            save_png(pixels, path)
            yield gr.update(value=str(path), label=label)  # gradio copies the file before it asks for more


def generate_stream(model: ImageTransformer, count: int, captions: Sequence[str]) -> Stream:
    return Stream(count, model.config.image_size, order=_order(model), captions=captions)


def complete_stream(model: ImageTransformer, truth: np.ndarray, count: int, captions: Sequence[str]) -> Stream:
    """Of `truth`, (size, size, 3) uint8, the rows that the model can keep are given."""
    size, rows = model.config.image_size, kept_rows(model)
    reference = [("Given", truth[:rows]), ("Truth", truth)]
    return Stream(
        count, size, base=truth, given=rows * size, order=_order(model), reference=reference, captions=captions
    )


def upscale_stream(
    model: ImageTransformer, source: np.ndarray, truth: np.ndarray | None, count: int, captions: Sequence[str]
) -> Stream:
    size = model.config.image_size
    factor = size // model.config.source_size
    side = model.config.source_size
    reference = [(f"{side}x{side} input", source), ("Bicubic", enlarge(source, factor, BICUBIC))]
    if truth is not None:
        reference.append(("Truth", truth))
    base = enlarge(source, factor, NEAREST)
    return Stream(count, size, base=base, reference=reference, order=_order(model), captions=captions)


def _condition(model: ImageTransformer, class_name, guidance, count: int, seed: int) -> tuple[dict, str]:
    """Arguments of `sample` for a class and how far it is followed, and words for them and the seed."""
    guidance, classes = requests.guidance(guidance), model.config.classes
    label = requests.label(class_name, classes, chance=seed)
    about = f"{(*classes, requests.NO_CLASS)[label]}, seed {seed}"
    if label == len(classes):
        guidance = 1.0  # with no class any is the same, and this one is the quickest
    return {"labels": [label] * count if classes else None, "guidance": guidance}, about


def _classes(names: list[str], value: str) -> tuple[dict, dict]:
    """Updates of the dropdown of classes and of the guidance."""
    some = len(names) > 1
    return gr.update(choices=names, value=value, interactive=some), gr.update(interactive=some)


def _captions(seed: int, count: int) -> list[str]:
    return [f"Seed {each}" for each in requests.seeds(seed, count)]


def _finished(stream: Stream, pictures: np.ndarray, text: str) -> dict:
    stream.append(pictures, len(stream.order))
    return stream.value(text)


def _every(size: int) -> int:
    """Pixels between two looks at the clock."""
    return max(size**2 // LOOKS, 1)


def _order(model: ImageTransformer) -> list[int] | None:
    """None where pixels come in raster order: then it need not be sent."""
    order = pixel_order(model).tolist()
    return None if order == sorted(order) else order


def _show(pictures, stream: Stream, about: str, seed: int) -> Frames:
    """Yields what is drawn so far, at most FRAMES_A_SECOND times a second but LEAST_FRAMES times a picture at least."""
    yield stream.value(f"Drawing {about} ..."), None, seed
    started = shown = time.monotonic()
    first, looks = stream.done, _every(stream.size)
    for snapshot in pictures:
        now = time.monotonic()
        enough = max((snapshot.total - first) // LEAST_FRAMES - looks, 1)  # the next look might be too late
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
