"""The running demo through its API: what it refuses, in a sentence, and goes on."""

import os

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app_client import (
    CAT, SIZE, assert_goes_on, assert_sentence, assert_sentence_or_nothing, begin, encode, noise, opened, png, refusal, run
)
from server import ROOT, Listener, upload

pytest_plugins = "app_fixtures"

FILE = {"_type": "gradio.FileData"}  # what clients put into "meta"


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
