"""The running demo through its API: what it yields, what it refuses and how."""

import contextlib
import ctypes
import io
import json
import os
import urllib.request

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from server import ROOT, Listener, call, drawn, pictures_in, reference, upload

pytest_plugins = "app_fixtures"

EXAMPLES = ROOT / "assets" / "examples"
CAT, FACE = EXAMPLES / "objects" / "cat.png", EXAMPLES / "faces" / "hopper.jpg"
FILE = {"_type": "gradio.FileData"}  # what clients put into "meta"
SIZE, PIXELS = 32, 1024


@pytest.fixture(scope="session")
def client(app, tmp_path_factory):
    return Client(app.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
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


# ---- what it yields -----------------------------------------------------------------------------------------


def test_names_of_tasks_and_parameters(app, client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {task: [p["parameter_name"] for p in endpoint["parameters"]] for task, endpoint in endpoints.items()}
    rest = ["temperature", "count", "seed", "model"]
    assert names == {
        "/generate": ["class_name", *rest, "guidance"], "/complete": ["image", *rest, "class_name", "guidance"],
        "/super_resolve": ["image", *rest],
    }
    with urllib.request.urlopen(f"{app.url}/gradio_api/info") as answer:
        assert json.load(answer)["named_endpoints"].keys() == names.keys()


def test_generate(client):
    three = assert_whole_run(run(client, "generate", "cat", 0.9, 3, 5), 3, PIXELS, seed=5)
    assert len({picture.tobytes() for picture in three}) == 3
    one = assert_whole_run(run(client, "generate", "cat", 0.9, 1, 5), 1, PIXELS, seed=5)
    # The noise is the same and a batch of three differs from one of one by rounding alone. In principle that can push
    # a colour over the edge between two levels, and all that follows then differs; it has not been seen to happen.
    assert np.array_equal(one[0], three[0])


def test_guidance_follows_the_class(client):
    """The default is the page's; without a class there is nothing to follow."""
    pictures = {g: assert_whole_run(run(client, "generate", "cat", 0.9, 1, 5, None, g), 1, PIXELS, seed=5) for g in (1, 5, 8)}
    assert not np.array_equal(pictures[1], pictures[5]) and not np.array_equal(pictures[5], pictures[8])
    assert np.array_equal(assert_whole_run(run(client, "generate", "cat", 0.9, 1, 5), 1, PIXELS, seed=5), pictures[5])
    of_none = [run(client, "generate", "no class", 0.9, 1, 5, None, g) for g in (1, 6)]
    assert np.array_equal(*(assert_whole_run(outputs, 1, PIXELS, seed=5) for outputs in of_none))


def random_seed(client) -> int:
    """A seed that the app has drawn."""
    job = client.submit("no class", 1.0, 1, None, api_name="/generate")
    for _, _, used in job:
        job.cancel()
        return used


def test_complete(client):
    with Image.open(CAT) as image:
        truth = np.array(image.convert("RGB"))
    arguments = {"image": handle_file(CAT), "temperature": 1.0, "count": 2}
    outputs = list(client.submit(**arguments, seed=None, api_name="/complete"))
    pictures = assert_whole_run(outputs, 2, PIXELS // 2)
    assert (pictures[:, : SIZE // 2] == truth[: SIZE // 2]).all()
    assert not np.array_equal(pictures[0], pictures[1])
    used = outputs[-1][2]
    again = run(client, "complete", handle_file(CAT), 1.0, 2, used)
    assert np.array_equal(assert_whole_run(again, 2, PIXELS // 2, seed=used), pictures)
    assert random_seed(client) != used  # another one each time


def test_complete_a_class(client):
    """No class unless told; with one, guidance follows it."""

    def ending(*more) -> np.ndarray:
        return assert_whole_run(run(client, "complete", handle_file(CAT), 1.0, 1, 5, None, *more), 1, PIXELS // 2, seed=5)

    plain, cat, guided = ending(), ending("cat", 1), ending("cat")
    assert np.array_equal(plain, ending("no class")) and np.array_equal(guided, ending("cat", 5))
    assert len({pictures.tobytes() for pictures in (plain, cat, guided)}) == 3
    assert (guided[:, : SIZE // 2] == plain[:, : SIZE // 2]).all()


def test_super_resolve_takes_a_photo(client):
    outputs = run(client, "super_resolve", handle_file(FACE), 0.8, 1, 0)
    assert_whole_run(outputs, 1, PIXELS, seed=0)
    value = outputs[0][0]
    truth = reference(value, "Truth").reshape(8, 4, 8, 4, 3)
    assert np.array_equal(reference(value, "8x8 input"), np.floor(truth.mean(axis=(1, 3)) + 0.5))


def test_curl_gets_a_stream_too(app):
    source = noise(8, 8, 3)
    events = call(app.url, "super_resolve", [upload(app.url, "eight.png", png(source)), 1.0, 2, 4_294_967_295, None])
    assert {event for event, _ in events} == {"generating", "complete"} and events[-1][0] == "complete"
    partial = [drawn(value) for _, (value, _, _) in events]
    assert partial == sorted(partial) and len(set(partial)) > 16 and partial[-1] == PIXELS
    value, files, seed = events[-1][1]
    assert seed == 4_294_967_295
    assert np.array_equal(reference(value, "8x8 input"), source)  # a picture of 8x8 is the source itself
    assert reference(value, "Truth") is None
    for file, shown in zip(files, pictures_in(value), strict=True):
        with urllib.request.urlopen(file["url"]) as answer:
            assert np.array_equal(read_png(io.BytesIO(answer.read())), shown)


def test_another_shape(client, tmp_path):
    Image.fromarray(noise(90, 47, 3)).save(tmp_path / "tall.png")
    assert reference(begin(client, "complete", handle_file(tmp_path / "tall.png"), 1.0, 1, 1), "Truth") is not None
    value = begin(client, "super_resolve", handle_file(tmp_path / "tall.png"), 1.0, 1, 1)
    assert reference(value, "8x8 input").shape == (8, 8, 3)


def first_message(client, name: str, seed: int) -> str:
    """What stands under the canvas at the start: the class and the seed."""
    job = client.submit(name, 1.0, 1, seed, api_name="/generate")
    value, _, _ = next(iter(job))
    job.cancel()
    return value["msg"]


def test_classes(client):
    assert begin(client, "generate", "truck", 1.0, 8, 3)["count"] == 8
    assert "no class, seed 3" in first_message(client, "no class", 3)
    assert first_message(client, "surprise me", 1) == first_message(client, "surprise me", 1)
    assert len({first_message(client, "surprise me", seed).split(",")[0] for seed in range(4)}) > 1


# ---- pictures that it takes ---------------------------------------------------------------------------------


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """By file name: unusual pictures, and the 32x32 RGB that they mean."""
    rgb = noise(SIZE, SIZE, 3)
    image, grey = Image.fromarray(rgb), rgb[:, :, 0]
    in_grey = np.repeat(grey[:, :, None], 3, axis=2)
    palette, cmyk = image.quantize(200), image.convert("CMYK")
    rotate = Image.Exif()
    rotate[0x0112] = 6  # the camera was held upright: turn clockwise
    veil = np.where(rgb[:, :, :1] < 128, 0, 255).astype(np.uint8)  # each pixel either clear or solid
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("#804020", "#2040ff", "#ffffff")]
    gif = encode(frames[0], "gif", save_all=True, append_images=frames[1:], duration=50)
    return {
        "one.png": (png(rgb[:1, :1]), np.broadcast_to(rgb[0, 0], rgb.shape)),
        "grey.png": (png(grey), in_grey),
        "deep.png": (encode(Image.fromarray(grey.astype(np.uint16) * 257), "png"), in_grey),
        "cmyk.tiff": (encode(cmyk, "tiff"), np.array(cmyk.convert("RGB"))),
        "palette.png": (encode(palette, "png"), np.array(palette.convert("RGB"))),
        "moving.gif": (gif, np.broadcast_to(np.uint8([0x80, 0x40, 0x20]), rgb.shape)),
        "clear.png": (png(np.concatenate([rgb, veil], axis=2)), np.where(veil, rgb, 255)),
        "turned.png": (encode(image, "png", exif=rotate), np.rot90(rgb, -1)),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_taken(client, tmp_path, name):
    content, expected = odd_pictures()[name]
    (tmp_path / name).write_bytes(content)
    value = begin(client, "complete", handle_file(tmp_path / name), 1.0, 1, 1)
    assert np.array_equal(reference(value, "Truth"), expected)
    assert np.array_equal(pictures_in(value)[0, : SIZE // 2], expected[: SIZE // 2])


# ---- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["complete", "super_resolve"])
@pytest.mark.parametrize("name, content, says", [
    ("text.png", b"This is no picture.", "not a picture"),
    ("empty.png", b"", "not a picture"),
    ("cut.png", png(noise(64, 64, 3))[:6000], "cut short"),
    ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
])
def test_files_that_are_no_pictures(client, tmp_path, task, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AppError) as error:
        run(client, task, handle_file(tmp_path / name), 1.0, 1, 1)
    assert_sentence(str(error.value))
    assert says in str(error.value)
    assert_goes_on(client)


def test_a_bomb_is_not_decoded(app, client):
    bomb = encode(Image.new("1", (12_000, 12_000)), "png")
    assert len(bomb) < 30_000
    assert_goes_on(client)  # whatever the first picture costs is paid
    app.forget_peak()
    before = app.memory("VmRSS")
    for task in ("complete", "super_resolve"):
        message = refusal(app.url, task, [upload(app.url, "bomb.png", bomb), 1.0, 1, 1, None])
        assert_sentence(message)
        assert "12000x12000" in message
    assert app.memory("VmHWM") - before < 200e6
    assert_goes_on(client)


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


@pytest.mark.parametrize("task", ["complete", "super_resolve"])
@pytest.mark.parametrize("meta", [{}, {"meta": FILE}], ids=["bare", "meta"])
def test_files_that_nobody_uploaded(app, client, tmp_path, task, meta):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(noise(SIZE, SIZE, 3)))
    sent = upload(app.url, "mine.png", png(noise(SIZE, SIZE, 3)))["path"]
    climbing = f"{os.path.dirname(sent)}/{os.path.relpath(secret, os.path.dirname(sent))}"
    with opened(secret) as heard:
        for path in (str(secret), climbing):
            message = refusal(app.url, task, [{"path": path, **meta}, 1.0, 1, 1, None])
            (assert_sentence_or_nothing if meta else assert_sentence)(message)
        assert not heard()
        secret.read_bytes()
        assert heard()
    assert_goes_on(client)


def test_a_file_of_the_app_is_not_a_picture_of_the_visitor(app):
    path = str(ROOT / "assets" / "gallery" / "generate.png")
    assert_sentence(refusal(app.url, "complete", [{"path": path}, 1.0, 1, 1, None]))
    assert_sentence_or_nothing(refusal(app.url, "complete", [path, 1.0, 1, 1, None]))


@pytest.mark.parametrize("meta", [{}, {"meta": FILE}], ids=["bare", "meta"])
def test_addresses_are_not_fetched(app, client, outside, meta):
    asked = outside.connections
    with Listener() as listener:
        for picture in ({"path": f"{listener.url}/x.png"}, {"path": "x.png", "url": f"{listener.url}/x.png"}):
            message = refusal(app.url, "complete", [{**picture, **meta}, 1.0, 1, 1, None])
            (assert_sentence_or_nothing if meta else assert_sentence)(message)
        assert not listener.connections
    outside.connections = asked  # gradio looks the address up, which is no doing of the app
    assert_goes_on(client)


def test_odd_paths(app, client):
    for path in ("", "nowhere.png", "a\0b", "\ud800", "x" * 5000, "/", "/etc/passwd", "..", "../../app.py", None):
        assert_sentence(refusal(app.url, "complete", [{"path": path}, 1.0, 1, 1, None]))
    for path in (3, [], {"path": "x.png"}):
        assert_sentence_or_nothing(refusal(app.url, "complete", [{"path": path}, 1.0, 1, 1, None]))
    assert_goes_on(client)


def test_no_picture(app, client):
    for task in ("complete", "super_resolve"):
        assert_sentence(refusal(app.url, task, [None, 1.0, 1, 1, None]))
        for nothing in ({}, "", 3, []):
            assert_sentence_or_nothing(refusal(app.url, task, [nothing, 1.0, 1, 1, None]))
        with pytest.raises(AppError) as error:
            run(client, task, None, 1.0, 1, 1)
        assert_sentence(str(error.value))
    assert_goes_on(client)


NUMBERS = {  # as JSON, which knows no NaN, but Python's does
    "temperature": [
        "0", "-1", "NaN", "Infinity", "1e300", "1e999", "1" + "0" * 400, "2.01", '"1"', "true", "null", "[1]",
    ],
    "count": ["0", "-1", "1000", "2.5", "9", "NaN", "1e300", "1" + "0" * 400, '"2"', "true", "null", "[1]"],
    "guidance": ["-1", "10.5", "NaN", "1e300", '"3"', "true", "null", "[1]"],
    "seed": ["-1", "4294967296", "0.5", "NaN", "1e300", "1" + "0" * 400, '"7"', "true", "[1]"],
}


@pytest.mark.parametrize("field", NUMBERS)
def test_odd_numbers(app, client, field):
    place = ["temperature", "count", "seed", "model", "guidance"].index(field)
    for number in NUMBERS[field]:
        numbers = ["1.0", "1", "1", "null", "3"]
        numbers[place] = number
        message = refusal(app.url, "generate", f'{{"data": ["cat", {", ".join(numbers)}]}}')
        assert_sentence(message)
        assert field in message.lower() or (field, "samples" in message) == ("count", True), message
        begin(client, "generate", "cat", 1.0, 1, 1)


def test_odd_numbers_elsewhere(app, client):
    picture = upload(app.url, "cat.png", CAT.read_bytes())
    for task in ("complete", "super_resolve"):
        for numbers in ([0, 1, 1], [1, 0, 1], [1, 1, -1], [None, 1, 1]):
            assert_sentence(refusal(app.url, task, [picture, *numbers, None]))
    with pytest.raises(AppError, match="Temperature") as error:
        run(client, "generate", "cat", 5, 1, 1)
    assert_sentence(str(error.value))
    assert_goes_on(client)


@pytest.mark.parametrize("name", ["zebra", "Cat", "", 3, None, ["cat"], {"cat": 1}, "<b>cat</b>" * 1000])
def test_unknown_classes(app, client, name):
    message = refusal(app.url, "generate", [name, 1.0, 1, 1, None])
    assert_sentence(message)
    assert "cat" in message and "truck" in message  # it says what there is
    begin(client, "generate", "cat", 1.0, 1, 1)
