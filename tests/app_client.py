"""What the tests of the demo ask it through its API, and what they expect of an answer. The app is in app_fixtures.py."""

import contextlib
import ctypes
import io
import os
from concurrent.futures import wait

import numpy as np
from gradio_client import handle_file
from PIL import Image

from server import ROOT, call, drawn, pictures_in

EXAMPLES = ROOT / "assets" / "examples"
CAT, FACE = EXAMPLES / "objects" / "cat.png", EXAMPLES / "faces" / "hopper.jpg"
SIZE, PIXELS = 32, 1024


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def run(client, task: str, *arguments) -> list[tuple[dict, list[str] | None, int]]:
    """Everything that a run yields. Raises AppError with its refusal."""
    job = client.submit(*arguments, api_name=f"/{task}")
    outputs = list(job)
    job.result()  # raises what the loop over a job keeps to itself
    return outputs


def begin(client, task: str, *arguments) -> dict:
    """A run up to its first new pixels, then cancelled: the canvas's value by then."""
    job = client.submit(*arguments, api_name=f"/{task}")
    for value, _, _ in job:
        if drawn(value):
            job.cancel()
            wait([job.future], timeout=20)  # the client may lose what is submitted while it takes its leave
            return value
    raise AssertionError(f"{task} drew nothing: {job.exception()}")


def assert_goes_on(client) -> None:
    """The app still works after what just happened to it."""
    begin(client, "complete", handle_file(CAT), 1.0, 1, 1)


def assert_sentence(message: object) -> None:
    """What a visitor may read: one or two short sentences on one line, with no path of the server and no traceback."""
    assert isinstance(message, str) and message, message
    assert message.endswith(".") and len(message) < 200, message
    for word in ("/", "\\", "\n", "Traceback", "Error", ".py"):
        assert word not in message, message


def assert_sentence_or_nothing(message: object) -> None:
    """Gradio itself refuses some input before the app sees it, without a word."""
    if message is not None:
        assert_sentence(message)


MORE = {"generate": [1], "complete": ["no class", 1], "super_resolve": []}  # what follows the parameters of all tasks


def refusal(url: str, task: str, data: list | str) -> str:
    """The message of a call that ends in an error, before anything was yielded. data: up to the model, or a whole body."""
    (event, answer), = call(url, task, data if isinstance(data, str) else data + MORE[task])
    assert event == "error", (event, answer)
    return answer["error"]


def read_png(path: str, size: int = SIZE) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (size, size))
        return np.array(image)


def assert_whole_run(outputs, count: int, new: int, seed: int | None = None, size: int = SIZE) -> np.ndarray:
    """A run's outputs are as promised; its pictures: (count, size, size, 3) uint8."""
    steps = [drawn(value) for value, _, _ in outputs]
    parts = sorted({n for n in steps if 0 < n < new})
    assert steps == sorted(steps) and steps[-1] == new
    assert len(parts) >= 16, steps
    assert {4 * n // new for n in parts} == {0, 1, 2, 3}, steps  # in each quarter of the run
    assert any(steps[:3]), steps  # the first new pixels come at once
    assert len({value["run"] for value, _, _ in outputs}) == 1
    assert len({used for _, _, used in outputs}) == 1 and outputs[0][2] in (range(2**32) if seed is None else [seed])
    assert not any(files for _, files, _ in outputs[:-1])
    value, files, _ = outputs[-1]
    assert value["count"] == len(files) == count
    pictures = np.stack([read_png(path, size) for path in files])
    assert np.array_equal(pictures, pictures_in(value))  # exact, and in order
    return pictures


@contextlib.contextmanager
def opened(path):
    """Yields a function that says whether anybody has opened the file since."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(path), 0x20) >= 0  # IN_OPEN

    def heard() -> bool:
        try:
            return bool(os.read(watch, 4096))
        except BlockingIOError:
            return False

    try:
        yield heard
    finally:
        os.close(watch)
