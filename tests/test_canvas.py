"""The streaming canvas's Python half: what `Stream` sends. (The browser half is tested with the app.)"""

import json

import numpy as np
import pytest

from imtx.demo.canvas import Stream, canvas

SIZE = 8
STEPS = SIZE * SIZE
# 2D local attention: blocks of 4 x 4 in raster order, raster inside a block.
BLOCKS = np.arange(STEPS).reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(-1)
ORDERS = pytest.mark.parametrize("order", [None, BLOCKS], ids=["raster", "blocks"])


def picture(seed, count=None):
    shape = (SIZE, SIZE, 3) if count is None else (count, SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decode(value):
    """The samples as the browser draws them: (count, size, size, 3), the steps without a pixel 0."""
    out = np.zeros((value["count"], value["size"] ** 2, 3), np.uint8)
    order = np.array(value["order"] or range(out.shape[1]))
    given = np.frombuffer(bytes.fromhex(value["base"]), np.uint8).reshape(-1, 3)[: value["given"]]
    out[:, order[: len(given)]] = given
    new = np.frombuffer(bytes.fromhex(value["hex"]), np.uint8).reshape(-1, value["count"], 3)
    out[:, order[len(given) : len(given) + len(new)]] = new.swapaxes(0, 1)
    return out.reshape(value["count"], value["size"], value["size"], 3)


@ORDERS
@pytest.mark.parametrize("count", [1, 3])
def test_the_pictures_arrive_exactly_and_the_value_only_grows(order, count):
    pixels = picture(0, count)
    stream = Stream(count, SIZE, base=picture(1), reference=[("Truth", picture(2))], order=order)
    before = stream.value("")
    for done in (0, 1, 7, 7, 40, STEPS):
        stream.append(pixels, done)
        value = stream.value(f"pixel {done}")
        assert len(value["hex"]) == 6 * count * done
        assert value["hex"].startswith(before["hex"])
        assert {k for k in value if value[k] != before[k]} <= {"hex", "msg"}
        before = json.loads(json.dumps(value))  # what the browser gets
        assert before == value
    assert np.array_equal(decode(before), pixels)


def test_hex_is_step_major_in_generation_order():
    pixels = np.zeros((2, 2, 2, 3), np.uint8)
    pixels[0, 1, 0], pixels[1, 1, 0] = (1, 2, 255), (3, 4, 5)  # raster index 2
    pixels[0, 0, 0] = (16, 16, 16)
    stream = Stream(2, 2, order=[2, 0, 3, 1])
    stream.append(pixels, 2)
    assert stream.value("")["hex"] == "0102ff" "030405" "101010" "000000"


@ORDERS
def test_given_pixels_are_shown_from_the_base_and_never_sent_again(order):
    truth, pixels = picture(0), picture(1, 2)
    half = STEPS // 2  # the top half: whole rows, and whole rows of blocks
    pixels[:, : SIZE // 2] = truth[: SIZE // 2]
    stream = Stream(2, SIZE, base=truth, given=half, order=order)
    start = stream.value("")
    assert start["hex"] == "" and stream.done == half
    assert len(start["base"]) == 6 * half  # the half that is to be guessed does not reach the browser
    assert np.array_equal(decode(start)[1, : SIZE // 2], truth[: SIZE // 2])
    stream.append(pixels, STEPS)
    assert len(stream.value("")["hex"]) == 6 * 2 * half
    assert np.array_equal(decode(stream.value("")), pixels)


def test_a_base_without_given_pixels_covers_the_whole_picture():
    base = picture(0)
    assert Stream(1, SIZE, base=base).value("")["base"] == base.tobytes().hex()
    assert Stream(1, SIZE).value("")["base"] == ""


def test_references_may_be_smaller_and_runs_have_names():
    small = picture(0)[:2, :4]  # the top half of a 4 x 4 picture
    one, two = (Stream(1, SIZE, reference=[("8x8 input", small)]).value("") for _ in range(2))
    assert one["reference"] == [["8x8 input", 4, small.tobytes().hex()]]
    assert one["run"] != two["run"]


def test_samples_may_have_captions():
    assert Stream(2, SIZE, captions=["cat", "dog"]).value("")["captions"] == ["cat", "dog"]
    assert Stream(2, SIZE).value("")["captions"] == []


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="order"):
        Stream(1, SIZE, order=[0] * STEPS)
    with pytest.raises(ValueError, match="given"):
        Stream(1, SIZE, given=3)
    with pytest.raises(ValueError, match="base"):
        Stream(1, SIZE, base=picture(0)[:4])
    with pytest.raises(ValueError, match="2 samples, and 1 captions"):
        Stream(2, SIZE, captions=["cat"])
    with pytest.raises(ValueError, match="uint8"):
        Stream(1, SIZE, base=picture(0) / 255)
    stream = Stream(1, SIZE)
    stream.append(picture(0, 1), 5)
    for done in (4, STEPS + 1):
        with pytest.raises(ValueError, match="step"):
            stream.append(picture(0, 1), done)
    with pytest.raises(ValueError, match="pictures"):
        stream.append(picture(0, 2), 6)


def test_component():
    html = canvas("complete")
    assert html.elem_id == "canvas-complete"
    assert html.value["count"] == 1 and html.value["hex"] == ""
    # The template and the style are filled in as templates: nothing in them may be taken for a placeholder.
    assert not any(mark in html.html_template + html.css_template for mark in ("${", "{{", "`", "\\"))
