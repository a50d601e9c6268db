"""What visitors send, checked: every refusal is one sentence that names the fix.

Gradio's own checks are switched off (`preprocess=False`), because they let some bad input through and answer others
with a stack trace; so values arrive here as the browser or a client sent them.
"""

import math
import os
import random
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from ..images import BadImage, open_image
from ..sampling import SEEDS

SURPRISE, NO_CLASS = "surprise me", "no class"
MAX_COUNT = 8
TEMPERATURES = (0.05, 2.0)
GUIDANCES = (0.0, 10.0)


def refusal(sentence: str) -> gr.Error:
    """Shown to the visitor as it is, and not logged as a crash."""
    return gr.Error(sentence, print_exception=False)


def temperature(value) -> float:
    return between(value, *TEMPERATURES, "Temperature")


def guidance(value) -> float:
    return between(value, *GUIDANCES, "Guidance")


def between(value, low: float, high: float, name: str) -> float:
    if not _is_number(value) or not low <= value <= high:
        raise refusal(f"{name} must be a number from {low:g} to {high:g}.")
    return float(value)


def count(value) -> int:
    if not _is_whole(value) or not 1 <= value <= MAX_COUNT:
        raise refusal(f"The number of samples must be a whole number from 1 to {MAX_COUNT}.")
    return int(value)


def seed(value) -> int:
    """A random one if none is given."""
    if value is None:
        return random.randrange(SEEDS)
    if not _is_whole(value) or not 0 <= value < SEEDS:
        raise refusal(f"The seed must be a whole number from 0 to {SEEDS - 1}, or empty for a random one.")
    return int(value)


def seeds(first: int, number: int) -> list[int]:
    """One a sample: the seed shown and those that follow it."""
    return [(first + i) % SEEDS for i in range(number)]


def one_of(models: dict, name):
    """The model of that name among those of a task; None means the first. No other name is looked up anywhere."""
    if name is None:
        return next(iter(models.values()))
    if not isinstance(name, str) or name not in models:
        raise refusal(f"There is no such model here. Choose one of: {', '.join(models)}.")
    return models[name]


def choices(classes: tuple[str, ...]) -> list[str]:
    """What `label` takes."""
    return [SURPRISE, *classes, NO_CLASS] if classes else [NO_CLASS]


def label(name, classes: tuple[str, ...], chance: int) -> int:
    """The index of a class; `len(classes)` is "no class". `chance`, the seed, decides which class surprises."""
    if name == NO_CLASS or name == SURPRISE and not classes:
        return len(classes)
    if name == SURPRISE:
        return random.Random(chance).randrange(len(classes))
    if name not in classes:
        raise refusal(f"There is no such class. Choose one of: {', '.join(choices(classes))}.")
    return classes.index(name)


def picture(value, allowed: Path) -> Image.Image:
    """The picture that a visitor uploaded, or one of the examples, which lie in `allowed`."""
    try:
        return open_image(_own_file(value, allowed))
    except BadImage as error:
        raise refusal(str(error)) from error


def example(value, folder: Path) -> str | None:
    """The name of the example in `folder` that a visitor chose, which gradio hands on as a copy; None for any other picture."""
    content = Path(_own_file(value, folder)).read_bytes()
    return next((file.stem for file in folder.rglob("*.*") if file.is_file() and file.read_bytes() == content), None)


def _own_file(value, allowed: Path) -> str:
    """Where a picture lies that came from the visitor or from `allowed`.

    A file of the server that nobody uploaded is refused: gradio itself would open it.
    """
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise refusal("There is no picture yet. Upload one or choose an example.")
    try:
        real = os.path.realpath(path)
    except ValueError:  # a NUL, half of a surrogate pair
        raise refusal("That picture was not uploaded here. Upload it first.") from None
    folders = (os.path.realpath(get_upload_folder()), os.path.realpath(allowed))
    if not any(os.path.commonpath((real, folder)) == folder for folder in folders) or not os.path.isfile(real):
        raise refusal("That picture was not uploaded here. Upload it first.")
    return real


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_whole(value) -> bool:
    return _is_number(value) and value == int(value)
