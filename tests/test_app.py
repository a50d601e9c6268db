"""The running demo through its API: what it yields, what it refuses and how, and which weights it starts with."""

import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import save_file

from imtx import PRESETS, ImageTransformer
from server import ROOT, Listener, Server, call, copy_of_app, drawn, pictures_in, reference, upload

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


def refusal(url: str, task: str, data: list | str) -> str:
    """The message of a call that ends in an error, before anything was yielded."""
    (event, answer), = call(url, task, data)
    assert event == "error", (event, answer)
    return answer["error"]


def read_png(path: str) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
        return np.array(image)


def assert_whole_run(outputs, count: int, new: int, seed: int | None = None) -> np.ndarray:
    """A run's outputs are as promised; its pictures: (count, 32, 32, 3) uint8."""
    steps = [drawn(value) for value, _, _ in outputs]
    parts = sorted({n for n in steps if 0 < n < new})
    assert steps == sorted(steps) and steps[-1] == new
    assert len(parts) >= 8, steps
    assert {4 * n // new for n in parts} == {0, 1, 2, 3}, steps  # in each quarter of the run
    assert any(steps[:3]), steps  # the first new pixels come at once
    assert len({value["run"] for value, _, _ in outputs}) == 1
    assert len({used for _, _, used in outputs}) == 1 and outputs[0][2] in (range(2**32) if seed is None else [seed])
    assert not any(files for _, files, _ in outputs[:-1])
    value, files, _ = outputs[-1]
    assert value["count"] == len(files) == count
    pictures = np.stack([read_png(path) for path in files])
    assert np.array_equal(pictures, pictures_in(value))  # exact, and in order
    return pictures


# ---- what it yields -----------------------------------------------------------------------------------------


def test_names_of_tasks_and_parameters(app, client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {task: [p["parameter_name"] for p in endpoint["parameters"]] for task, endpoint in endpoints.items()}
    rest = ["temperature", "count", "seed"]
    assert names == {
        "/generate": ["class_name", *rest], "/complete": ["image", *rest], "/super_resolve": ["image", *rest]
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
    assert begin_seed(client) != used  # another one each time


def begin_seed(client) -> int:
    """A seed that the app has drawn."""
    job = client.submit("no class", 1.0, 1, None, api_name="/generate")
    for _, _, used in job:
        job.cancel()
        return used


def test_super_resolve_takes_a_photo(client):
    outputs = run(client, "super_resolve", handle_file(FACE), 0.8, 1, 0)
    assert_whole_run(outputs, 1, PIXELS, seed=0)
    value = outputs[0][0]
    truth = reference(value, "Truth").reshape(8, 4, 8, 4, 3)
    assert np.array_equal(reference(value, "8x8 input"), np.floor(truth.mean(axis=(1, 3)) + 0.5))


def test_curl_gets_a_stream_too(app):
    source = noise(8, 8, 3)
    events = call(app.url, "super_resolve", [upload(app.url, "eight.png", png(source)), 1.0, 2, 4_294_967_295])
    assert {event for event, _ in events} == {"generating", "complete"} and events[-1][0] == "complete"
    partial = [drawn(value) for _, (value, _, _) in events]
    assert partial == sorted(partial) and len(set(partial)) >= 8 and partial[-1] == PIXELS
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


def test_classes(client):
    surprise = begin(client, "generate", "surprise me", 1.0, 1, 3)["msg"]
    assert begin(client, "generate", "no class", 1.0, 1, 3)["count"] == 1
    assert begin(client, "generate", "truck", 1.0, 8, 3)["count"] == 8
    assert surprise


def test_one_surprise_a_seed(app, client):
    def first(seed: int) -> str:
        job = client.submit("surprise me", 1.0, 1, seed, api_name="/generate")
        value, _, _ = next(iter(job))
        job.cancel()
        return value["msg"]

    assert first(1) == first(1)
    assert len({first(seed).split(",")[0] for seed in range(6)}) > 1


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
        message = refusal(app.url, task, [upload(app.url, "bomb.png", bomb), 1.0, 1, 1])
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
    link = f"{os.path.dirname(sent)}/link.png"
    os.symlink(secret, link)
    with opened(secret) as heard:
        for path in (str(secret), climbing, *([] if meta else [link])):
            message = refusal(app.url, task, [{"path": path, **meta}, 1.0, 1, 1])
            if not meta:  # gradio itself refuses the others, and says nothing
                assert_sentence(message)
            assert message is None or "/" not in message
        assert not heard()
        secret.read_bytes()
        assert heard()
    assert_goes_on(client)


def test_a_file_of_the_app_is_not_a_picture_of_the_visitor(app):
    assert_sentence(refusal(app.url, "complete", [{"path": str(ROOT / "assets/gallery/generate.png")}, 1.0, 1, 1]))
    assert_sentence(refusal(app.url, "complete", [str(ROOT / "assets/gallery/generate.png"), 1.0, 1, 1]))


@pytest.mark.parametrize("meta", [{}, {"meta": FILE}], ids=["bare", "meta"])
def test_addresses_are_not_fetched(app, client, meta):
    with Listener() as listener:
        for picture in ({"path": f"{listener.url}/x.png"}, {"path": "x.png", "url": f"{listener.url}/x.png"}):
            message = refusal(app.url, "complete", [{**picture, **meta}, 1.0, 1, 1])
            if not meta:
                assert_sentence(message)
            assert message is None or "/" not in message
        assert not listener.connections
    assert_goes_on(client)


@pytest.mark.parametrize("path", ["", "nowhere.png", "a\0b", "\ud800", "x" * 5000, "/", "/etc/passwd", "..", 3, None, []])
def test_odd_paths(app, client, path):
    assert_sentence(refusal(app.url, "complete", [{"path": path}, 1.0, 1, 1]))
    assert_goes_on(client)


def test_no_picture(app, client):
    for task in ("complete", "super_resolve"):
        for nothing in (None, {}, ""):
            assert_sentence(refusal(app.url, task, [nothing, 1.0, 1, 1]))
        with pytest.raises(AppError) as error:
            run(client, task, None, 1.0, 1, 1)
        assert_sentence(str(error.value))
    assert_goes_on(client)


NUMBERS = {  # as JSON, which knows no NaN, but Python's does
    "temperature": ["0", "-1", "NaN", "Infinity", "1e300", "1e999", "1" + "0" * 400, "2.01", '"1"', "true", "null", "[1]"],
    "count": ["0", "-1", "1000", "2.5", "9", "NaN", "1e300", "1" + "0" * 400, '"2"', "true", "null", "[1]"],
    "seed": ["-1", "4294967296", "0.5", "NaN", "1e300", "1" + "0" * 400, '"7"', "true", "[1]"],
}


@pytest.mark.parametrize("field", NUMBERS)
def test_odd_numbers(app, client, field):
    place = ["temperature", "count", "seed"].index(field)
    for number in NUMBERS[field]:
        numbers = ["1.0", "1", "1"]
        numbers[place] = number
        message = refusal(app.url, "generate", f'{{"data": ["cat", {", ".join(numbers)}]}}')
        assert_sentence(message)
        assert field in message.lower() or (field, "samples" in message) == ("count", True), message
        begin(client, "generate", "cat", 1.0, 1, 1)


def test_odd_numbers_elsewhere(app, client):
    picture = upload(app.url, "cat.png", CAT.read_bytes())
    for task in ("complete", "super_resolve"):
        for numbers in ([0, 1, 1], [1, 0, 1], [1, 1, -1], [None, 1, 1]):
            assert_sentence(refusal(app.url, task, [picture, *numbers]))
    with pytest.raises(AppError, match="Temperature") as error:
        run(client, "generate", "cat", 5, 1, 1)
    assert_sentence(str(error.value))
    assert_goes_on(client)


@pytest.mark.parametrize("name", ["zebra", "Cat", "", 3, None, ["cat"], {"cat": 1}, "<b>cat</b>" * 1000])
def test_unknown_classes(app, client, name):
    message = refusal(app.url, "generate", [name, 1.0, 1, 1])
    assert_sentence(message)
    assert "cat" in message and "truck" in message  # it says what there is
    begin(client, "generate", "cat", 1.0, 1, 1)


# ---- the weights that it starts with ------------------------------------------------------------------------


def test_nothing_beyond_this_machine_was_asked(app, outside):
    """Neither at the start nor since; the Hub and every proxy lead to `outside`."""
    assert app.process.poll() is None
    assert outside.connections == 0


def test_log(app):
    assert "Generate, Complete: cifar10-dmol-1d" in app.log and "Super-resolve: faces-sr-1d" in app.log
    assert "Warning" not in app.log


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of small models, by preset."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "tiny-sr"):
        torch.manual_seed(0)
        ImageTransformer(PRESETS[name]).save_pretrained(folder / name)
    return {name: folder / name for name in ("tiny", "tiny-sr")}


@pytest.fixture(scope="module")
def refusals(tiny, tmp_path_factory):
    """Logs of `app.py --model ...` that must not start, by what is wrong. All are started at once: each imports a lot."""
    folder = tmp_path_factory.mktemp("refusals")
    damaged, foreign = folder / "damaged", folder / "foreign"
    ImageTransformer(PRESETS["tiny"]).save_pretrained(damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    save_file({"bert.weight": torch.zeros(2, 2)}, foreign / "model.safetensors")
    mixed = folder / "mixed"
    ImageTransformer(PRESETS["tiny"]).save_pretrained(mixed)
    save_file({"bert.weight": torch.zeros(2, 2)}, mixed / "model.safetensors")
    models = {
        "missing": folder / "nowhere" / "model",
        "damaged": damaged,
        "foreign": foreign,
        "mixed": mixed,
        "hub": "owner/name",
    }
    servers = {
        name: Server(folder / f"log-{name}", "--model", model, HF_ENDPOINT="http://127.0.0.1:9")
        for name, model in models.items()
    }
    try:
        yield {name: (server.refused(), str(models[name])) for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


@pytest.mark.parametrize("what, says", [
    ("missing", "no folder"),
    ("damaged", "model.safetensors is damaged"),
    ("foreign", "config.json"),
    ("mixed", "lacks"),
    ("hub", "cannot be reached"),
])
def test_models_that_cannot_be_used_say_why(refusals, what, says):
    log, model = refusals[what]
    assert model in log and says in log
    assert log.count("\n") == 1 and "Traceback" not in log


def test_an_unreachable_hub_is_given_up_at_once(tmp_path):
    """huggingface_hub alone would go on trying for 23 seconds, whether nobody is there or somebody never answers."""
    script = """if True:
        import time
        from imtx import CheckpointError, checkpoint
        start = time.monotonic()
        try:
            checkpoint.find("owner/name")
        except CheckpointError as error:
            print(time.monotonic() - start, error)
        """
    with Listener(silent=True) as silent:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / str(i))},
            )
            for i, endpoint in enumerate(["http://127.0.0.1:9", silent.url])
        ]
        for process in processes:
            output, _ = process.communicate(timeout=90)
            seconds, _, sentence = output.strip().partition(" ")
            assert float(seconds) < 5
            assert "owner/name" in sentence and sentence.endswith(".") and "\n" not in sentence
    assert silent.connections


@pytest.fixture(scope="module")
def servers(tiny, tmp_path_factory):
    """Servers with other weights than those bundled, all started at once."""
    folder = tmp_path_factory.mktemp("servers")
    missing, damaged = copy_of_app(folder / "missing"), copy_of_app(folder / "damaged")
    (missing / "assets" / "weights" / "faces-sr-1d").rename(folder / "gone")
    for shard in (damaged / "assets" / "weights" / "cifar10-dmol-1d").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    started = {name: Server(folder / f"log-{name}", "--model", tiny[name]) for name in tiny}
    started |= {root.name: Server(folder / f"log-{root.name}", root=root) for root in (missing, damaged)}
    try:
        yield {name: server.wait() for name, server in started.items()}
    finally:
        for server in started.values():
            server.stop()


def parameters(folder) -> str:
    return f"{sum(p.numel() for p in ImageTransformer.from_pretrained(folder).parameters()):,} parameters"


@pytest.mark.parametrize("name, task", [("tiny", "generate"), ("tiny", "complete"), ("tiny-sr", "super_resolve")])
def test_another_model_takes_the_place_of_its_task(servers, tiny, name, task):
    server = servers[name]
    client = Client(server.url, verbose=False)
    given = {"generate": "cat", "complete": handle_file(CAT), "super_resolve": handle_file(FACE)}[task]
    assert_whole_run(run(client, task, given, 1.0, 1, 1), 1, PIXELS // 2 if task == "complete" else PIXELS)
    weights = f"{tiny[name]}, {parameters(tiny[name])}"
    if name == "tiny":
        assert f"Generate, Complete: {weights}\nSuper-resolve: faces-sr-1d," in server.log
    else:
        assert f"Super-resolve: {weights}\n" in server.log and "Generate, Complete: cifar10-dmol-1d," in server.log


def test_the_other_tabs_go_on_without_the_faces(servers):
    server = servers["missing"]
    message = refusal(server.url, "super_resolve", [upload(server.url, "cat.png", CAT.read_bytes()), 1.0, 1, 1])
    assert_sentence(message)
    assert "weights" in message
    assert "faces-sr-1d: not loaded." in server.log
    client = Client(server.url, verbose=False)
    assert begin(client, "generate", "cat", 1.0, 1, 1)
    assert_goes_on(client)


def test_faces_go_on_without_the_generator(servers):
    server = servers["damaged"]
    assert "cifar10-dmol-1d: not loaded." in server.log and "model.safetensors is damaged" in server.log
    picture = upload(server.url, "cat.png", CAT.read_bytes())
    for task, given in (("generate", "surprise me"), ("complete", picture)):
        message = refusal(server.url, task, [given, 1.0, 1, 1])
        assert_sentence(message)
        assert "weights" in message
    assert begin(Client(server.url, verbose=False), "super_resolve", handle_file(FACE), 1.0, 1, 1)
