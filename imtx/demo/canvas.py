"""The streaming canvas: pictures that appear in the browser pixel by pixel, in the order they are generated.

`Stream` (here) writes the pixels, as soon as there are some; `canvas.js` draws them, at the pace that the visitor chose.
Between the two lies one JSON value:

    run        a name for this run; a new one tells the browser to start afresh
    count      samples drawn side by side            size   their width and height in pixels
    captions   what stands under each of them, [] for "Sample 1", "Sample 2", ...
    given      leading steps that are not generated  order  raster index of each step, [] for raster order
    base       pixels of steps 0, 1, ... to show before they are generated, as hex
    reference  [[caption, side, hex], ...] fixed pictures shown beside the samples
    hex        the generated pixels so far: for each step, for each sample, "rrggbb"
    msg        the text under the pictures
    stopped    never sent: the page adds it when a visitor presses Stop

Gradio sends a string that has grown as its new tail alone, so during a run `hex` only ever grows and nothing else
but `msg` changes: a frame costs a few hundred bytes, and no frame is lost on a slow line.
"""

import secrets
from pathlib import Path

import gradio as gr
import numpy as np


def canvas(task: str, value: dict | None = None) -> gr.HTML:
    """The component, with the id `canvas-<task>`; `value` comes from `Stream.value`.

    It hides gradio's progress, which would cover the picture: a listener that streams into it shows it on another
    component (`show_progress_on`). The browser puts every text of the value in as plain text, never as HTML.
    """

    def read(name: str) -> str:
        return Path(__file__).with_name(name).read_text(encoding="utf-8")

    return gr.HTML(
        value=Stream(1).value("Ready.") if value is None else value,
        html_template=read("canvas.html"),
        css_template=read("style.css"),
        js_on_load=read("canvas.js"),
        apply_default_css=False,
        elem_id=f"canvas-{task}",
        label="canvas",  # its name in the API
    )


class Stream:
    """One run of `count` samples, as a value for `canvas` that only grows.

    `base` is a picture to show under pixels that are not generated yet: all of it (super-resolution: the enlarged
    source), or, where the first `given` steps are not generated at all (completion), only those steps.
    `reference` is a list of (caption, picture); one with fewer rows than columns is filled up with "not drawn".
    `order` lists the raster index of each step's pixel; `captions` names the samples, if they are more than numbers.
    Pictures are uint8 arrays of shape (side, side, 3).
    """

    def __init__(self, count: int, size: int = 32, base=None, reference=None, given: int = 0, order=None, captions=()):
        steps = size * size
        self.count, self.size, self.done = count, size, given
        self.order = np.arange(steps) if order is None else np.asarray(order)
        if not np.array_equal(np.sort(self.order), np.arange(steps)):
            raise ValueError(f"order must hold each of the {steps} raster indices once")
        if not 0 <= given <= steps or (given and base is None):
            raise ValueError(f"given must be from 0 to {steps} pixels, and needs a base to show them")
        if base is not None and np.shape(base) != (size, size, 3):
            raise ValueError(f"base must have the shape ({size}, {size}, 3), not {np.shape(base)}")
        if len(captions) not in (0, count):
            raise ValueError(f"{count} samples, and {len(captions)} captions")
        under = [] if base is None else np.reshape(base, (steps, 3))[self.order[: given or steps]]
        self._fixed = {
            "run": secrets.token_hex(4),
            "count": count,
            "captions": list(captions),
            "size": size,
            "given": given,
            "order": [] if order is None else self.order.tolist(),
            "base": _hex(under),
            "reference": [[caption, picture.shape[1], _hex(picture)] for caption, picture in reference or []],
        }
        self._hex = ""

    def append(self, pixels: np.ndarray, done: int) -> None:
        """Add the steps [self.done, done) of all samples; `pixels` is uint8 (count, size, size, 3)."""
        if pixels.shape != (self.count, self.size, self.size, 3):
            raise ValueError(f"{self.count} pictures of {self.size}x{self.size} expected, not {pixels.shape}")
        if not self.done <= done <= len(self.order):
            raise ValueError(f"cannot go from step {self.done} to step {done} of {len(self.order)}")
        new = pixels.reshape(self.count, -1, 3)[:, self.order[self.done : done]]
        self._hex += _hex(new.swapaxes(0, 1))
        self.done = done

    def value(self, msg: str) -> dict:
        """The JSON value to yield to gradio now."""
        return {**self._fixed, "hex": self._hex, "msg": msg}


def _hex(pixels) -> str:
    pixels = np.asarray(pixels)
    if pixels.size and pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, not {pixels.dtype}")
    return pixels.tobytes().hex() if pixels.size else ""
