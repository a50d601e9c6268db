"""Crop, reduction, enlargement, PNG and contact sheet, to the pixel."""

import time

import numpy as np
import pytest
from PIL import Image

from imtx.images import (
    BICUBIC,
    MAX_ZOOM,
    NEAREST,
    area_means,
    enlarge,
    save_png,
    sheet,
    source_and_truth,
    square_crop,
)

GREEN = (0, 255, 0)


def noisy(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# Crop


def test_a_picture_of_the_size_asked_for_passes_unchanged():
    pixels = noisy(32, 32)
    assert np.array_equal(square_crop(Image.fromarray(pixels)), pixels)
    assert np.array_equal(square_crop(Image.fromarray(pixels), 32, 1, 0, 1), pixels)


def test_the_crop_is_pillows_lanczos_of_the_square():
    image = Image.fromarray(noisy(96, 160))
    want = np.asarray(image.crop((32, 0, 128, 96)).resize((32, 32), Image.Resampling.LANCZOS))
    got = square_crop(image)
    assert np.array_equal(got[:, 3:-3], want[:, 3:-3])
    assert not np.array_equal(got, want), "at a cut edge the filter also sees what lies beyond it"


def test_reduction_is_antialiased():
    """A fine checkerboard becomes grey, not black or white."""
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    got = square_crop(Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8)))
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127.5).max() < 3


@pytest.mark.parametrize("x, y, left", [(0, 0, 0), (1, 1, 64), (0.5, 0.5, 32), (0.25, 0.9, 16)])
def test_place_of_the_crop_in_a_wide_picture(x, y, left):
    pixels = noisy(64, 128)
    assert np.array_equal(square_crop(Image.fromarray(pixels), 64, 1, x, y), pixels[:, left : left + 64])


def test_place_and_zoom():
    pixels = noisy(128, 64)
    for x, y, left, top in [(0, 0, 0, 0), (1, 0, 32, 0), (0, 1, 0, 96), (0.5, 0.5, 16, 48)]:
        got = square_crop(Image.fromarray(pixels), 32, 2, x, y)
        assert np.array_equal(got, pixels[top : top + 32, left : left + 32])


def test_the_square_need_not_start_or_end_at_a_pixel():
    image = Image.fromarray(noisy(32, 32))
    box = (5.25, 1.75, 26.25, 22.75)  # a side of 21: zoom 32 / 21, with 11 pixels of room
    want = image.resize((32, 32), Image.Resampling.LANCZOS, box=box)
    assert np.array_equal(square_crop(image, 32, 32 / 21, 5.25 / 11, 1.75 / 11), np.asarray(want))


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (33, 7), (4999, 4801)])
def test_every_corner_is_within_the_picture(size):
    """Rounding must not put the square a hair outside, which Pillow refuses."""
    image = Image.new("RGB", size, GREEN)
    for zoom in (1, 1.1, 3, 7.7, MAX_ZOOM):
        for x, y in [(0, 0), (1, 1), (0.3, 0.7), (1, 0)]:
            assert (square_crop(image, 8, zoom, x, y) == GREEN).all()


@pytest.mark.parametrize("zoom", [0, 0.99, -1, MAX_ZOOM + 0.01, float("nan"), float("inf")])
def test_zoom_out_of_range(zoom):
    with pytest.raises(ValueError, match=f"Zoom must be from 1 to {MAX_ZOOM:g}, got {zoom}"):
        square_crop(Image.new("RGB", (9, 9)), zoom=zoom)


@pytest.mark.parametrize("place", [{"x": -0.1}, {"y": 1.1}, {"x": float("nan")}])
def test_place_out_of_range(place):
    with pytest.raises(ValueError, match="from 0 to 1, got"):
        square_crop(Image.new("RGB", (9, 9)), **place)


# Reduction


def test_area_means_are_exact_rounded_means():
    pixels = noisy(8, 12)
    got = area_means(pixels)
    assert got.shape == (2, 3, 3) and got.dtype == np.uint8
    for i, j, c in np.ndindex(2, 3, 3):
        cell = pixels[4 * i : 4 * i + 4, 4 * j : 4 * j + 4, c].tolist()
        assert got[i, j, c] == (sum(map(sum, cell)) + 8) // 16


def test_halves_are_rounded_up_and_nothing_overflows():
    cell = np.zeros((4, 4, 3), np.uint8)
    cell[0, 0] = (7, 8, 255)  # a sum of 8 is half a level
    assert area_means(cell).tolist() == [[[0, 1, 16]]]
    assert (area_means(np.full((64, 64, 3), 255, np.uint8), 64) == 255).all()


def test_area_means_of_many_pictures_at_once():
    pictures = np.stack([noisy(32, 32, seed) for seed in range(6)]).reshape(2, 3, 32, 32, 3)
    got = area_means(pictures)
    assert got.shape == (2, 3, 8, 8, 3)
    assert all(np.array_equal(got[i], area_means(pictures[i])) for i in np.ndindex(2, 3))
    assert np.array_equal(area_means(pictures, 1), pictures)


def test_area_means_are_fast_enough_for_a_data_set():
    pictures = np.zeros((5000, 32, 32, 3), np.uint8)
    start = time.perf_counter()
    area_means(pictures)
    assert time.perf_counter() - start < 3  # 0.2 s here; a loop over pictures in Python takes far longer


def test_area_means_say_what_is_wrong():
    with pytest.raises(ValueError, match="factor 4 must divide the sides 32 and 30"):
        area_means(noisy(32, 30))
    for dtype in (np.float32, np.int64, bool):
        with pytest.raises(TypeError, match="uint8"):
            area_means(noisy(8, 8).astype(dtype))


def test_source_and_truth():
    pixels = noisy(100, 80)
    source, truth = source_and_truth(Image.fromarray(pixels))
    assert np.array_equal(truth, square_crop(Image.fromarray(pixels), 32))
    assert np.array_equal(source, area_means(truth)) and source.shape == (8, 8, 3)


def test_a_picture_of_8x8_is_the_source_itself():
    pixels = noisy(8, 8)
    source, truth = source_and_truth(Image.fromarray(pixels))
    assert np.array_equal(source, pixels) and truth is None
    assert source_and_truth(Image.fromarray(noisy(8, 9)))[1] is not None


def test_enlarge():
    pixels = noisy(8, 8)
    nearest = enlarge(pixels, 4, NEAREST)
    assert np.array_equal(nearest, pixels.repeat(4, axis=0).repeat(4, axis=1)) and nearest.dtype == np.uint8
    bicubic = enlarge(pixels, 4, BICUBIC)
    assert bicubic.shape == (32, 32, 3) and bicubic.dtype == np.uint8 and not np.array_equal(bicubic, nearest)
    assert (enlarge(np.full((8, 8, 3), 77, np.uint8), 4, BICUBIC) == 77).all()


def test_results_can_be_written_to():
    """`torch.from_numpy` warns of arrays that cannot."""
    image = Image.fromarray(noisy(40, 40))
    arrays = [square_crop(image), square_crop(image, 40), *source_and_truth(image), enlarge(noisy(2, 2), 2, NEAREST)]
    assert all(array.flags.writeable for array in (*arrays, source_and_truth(image.crop((0, 0, 8, 8)))[0]))


# Files and sheets


def test_png_files_are_exact_and_leave_nothing_else_behind(tmp_path):
    path = tmp_path / "picture.png"
    for seed in range(2):  # the second replaces the first
        save_png(noisy(5, 7, seed), path)
        with Image.open(path) as image:
            assert image.format == "PNG" and np.array_equal(np.asarray(image), noisy(5, 7, seed))
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(noisy(4, 4), path)
    before = path.read_bytes()

    def save(image, target, *_, **__):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="disk full"):
        save_png(noisy(4, 4, 1), path)
    assert path.read_bytes() == before


def test_a_sheet_is_filled_row_by_row_on_white():
    pictures = np.stack([noisy(3, 5, seed) for seed in range(3)])
    page = sheet(pictures, columns=2, gap=1)
    assert page.shape == (2 * 4 + 1, 2 * 6 + 1, 3) and page.dtype == np.uint8
    expected = np.full_like(page, 255)
    expected[1:4, 1:6], expected[1:4, 7:12], expected[5:8, 1:6] = pictures
    assert np.array_equal(page, expected)


def test_a_sheet_shows_each_pixel_as_a_square():
    pictures = noisy(4, 4)[None]
    once, thrice = sheet(pictures, columns=1), sheet(pictures, columns=1, scale=3)
    assert np.array_equal(thrice, once.repeat(3, axis=0).repeat(3, axis=1))
    assert np.array_equal(sheet(pictures, columns=1, gap=0), pictures[0])
