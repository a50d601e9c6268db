"""The running demo through its API: what it yields, and the pictures that it takes."""

import io
import json
import urllib.request

import numpy as np
import pytest
from gradio_client import handle_file
from PIL import Image

from app_client import CAT, FACE, PIXELS, SIZE, assert_whole_run, begin, encode, noise, png, read_png, run
from server import call, drawn, pictures_in, reference, upload

pytest_plugins = "app_fixtures"


# ---- what it yields -----------------------------------------------------------------------------------------


def test_names_of_tasks_and_parameters(app, client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {task: [p["parameter_name"] for p in endpoint["parameters"]] for task, endpoint in endpoints.items()}
    rest = ["temperature", "count", "seed", "model"]
    assert names == {
        "/generate": ["class_name", *rest, "guidance"], "/complete": ["image", *rest, "class_name", "guidance"],
        "/super_resolve": ["image", *rest],
    }
    for endpoint in endpoints.values():
        assert [value["label"] for value in endpoint["returns"]] == ["canvas", "PNG files", "seed"]
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
    return run(client, "generate", "no class", 1.0, 1, None)[0][2]


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
    return run(client, "generate", name, 1.0, 1, seed)[0][0]["msg"]


def test_classes(client):
    assert begin(client, "generate", "truck", 1.0, 8, 3)["count"] == 8
    assert "no class, seed 3" in first_message(client, "no class", 3)
    assert first_message(client, "surprise me", 1) == first_message(client, "surprise me", 1)
    assert len({first_message(client, "surprise me", seed).split(",")[0] for seed in range(4)}) > 1


# ---- pictures that it takes ---------------------------------------------------------------------------------


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
