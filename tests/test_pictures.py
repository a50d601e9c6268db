"""How one picture becomes the model's pixels: decoded, cut to a square, reduced by exact means over areas."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from data_fixtures import SIZE, picture, pictures, encode, files, load, refusal, decoded, assert_images, entries, table  # noqa: F401, some are fixtures

from imtx.images import area_means, open_image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

from data.pictures import NotAligned, Unusable, area_resize, decode, fit


def area_resize_slowly(square: np.ndarray, size: int) -> np.ndarray:
    """One mean after another, in fractions: each pixel weighs as much as the part of it that lies in the cell."""
    scale = Fraction(len(square), size)
    result = np.zeros((size, size, 3), np.uint8)

    def parts(cell: int) -> list[tuple[int, Fraction]]:
        begin, end = cell * scale, (cell + 1) * scale
        overlaps = ((pixel, min(end, pixel + 1) - max(begin, pixel)) for pixel in range(len(square)))
        return [(pixel, overlap) for pixel, overlap in overlaps if overlap > 0]

    for row in range(size):
        for column in range(size):
            for colour in range(3):
                total = sum(h * w * int(square[y, x, colour]) for y, h in parts(row) for x, w in parts(column))
                result[row, column, colour] = int(total / scale**2 + Fraction(1, 2))
    return result


@pytest.mark.parametrize("side, size", [(8, 8), (9, 8), (13, 8), (16, 8), (37, 8), (7, 1), (138, 5)])
def test_pictures_are_reduced_by_means_over_areas(side, size):
    square = picture(side, side, side)
    assert np.array_equal(area_resize(square, size), area_resize_slowly(square, size))
    if side % size == 0:
        assert np.array_equal(area_resize(square, size), area_means(square, side // size))


def test_halves_are_rounded_up_and_sums_of_large_pictures_are_exact():
    board = np.indices((2, 2)).sum(axis=0)[..., None].repeat(3, axis=2) % 2
    assert (area_resize((board + 100).astype(np.uint8), 1) == 101).all()  # a mean of 100.5
    white = np.full((3001, 3001, 3), 255, np.uint8)
    assert (area_resize(white, 32) == 255).all()
    white[:94, :94] = 254  # the first cell is 93.78 pixels wide
    assert area_resize(white, 32)[0, 0, 0] == 254 and (area_resize(white, 32)[1:, 1:] == 255).all()


@pytest.mark.parametrize(
    "width, height, rows, columns",
    [(20, 12, (0, 12), (4, 16)), (12, 20, (4, 16), (0, 12)), (13, 8, (0, 8), (2, 10)), (8, 9, (0, 8), (0, 8))],
)
def test_the_square_is_the_middle_one(width, height, rows, columns):
    pixels = picture(0, width, height)
    square = pixels[slice(*rows), slice(*columns)]
    assert np.array_equal(fit(Image.fromarray(pixels), SIZE), area_resize_slowly(square, SIZE))


def test_the_crop_of_celeba_is_the_papers():
    pixels = picture(0, 178, 218)
    square = pixels[40:178, 20:158]  # T2T: crop_to_bounding_box(image, 40, 20, 218 - 80, 178 - 40)
    assert np.array_equal(fit(Image.fromarray(pixels), SIZE, celeba_crop=True), area_resize_slowly(square, SIZE))
    with pytest.raises(NotAligned, match="is 218x178, and --celeba-crop is for CelebA's aligned ones of 178x218"):
        fit(Image.fromarray(pixels.transpose(1, 0, 2)), SIZE, celeba_crop=True)


def test_a_picture_of_the_models_size_stays_as_it_is_and_a_smaller_one_is_not_enlarged():
    assert np.array_equal(fit(Image.fromarray(picture(0)), SIZE), picture(0))
    with pytest.raises(Unusable, match="the picture is 30x7, too small for the model's 8x8"):
        fit(Image.fromarray(picture(0, 30, 7)), SIZE)


def turned() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


@pytest.mark.parametrize(
    "image, form, options",
    [
        (Image.fromarray(picture(0, 12, 9)), "jpeg", turned()),
        (Image.fromarray(picture(0, 12, 9)), "webp", {"lossless": True}),
        (Image.fromarray(picture(0, 12, 9)).convert("P"), "png", {}),
        (Image.fromarray(picture(0, 12, 9)).convert("P"), "gif", {"transparency": 3}),
        (Image.fromarray(picture(0, 12, 9)).convert("L"), "png", {}),
        (Image.fromarray(picture(0, 12, 9)).convert("CMYK"), "tiff", {}),
        (Image.fromarray(picture(0, 12, 9)[..., 0].astype(np.uint16) * 257), "png", {}),
        (Image.merge("RGBA", [Image.fromarray(picture(seed, 12, 9)[..., 0]) for seed in range(4)]), "png", {}),
    ],
)
def test_every_kind_of_picture_is_read_as_the_demo_reads_it(image, form, options, tmp_path):
    image.save(tmp_path / "picture", form, **options)
    expected = open_image(tmp_path / "picture")
    for file in (tmp_path / "picture", (tmp_path / "picture").read_bytes()):
        assert decode(file).mode == "RGB" and np.array_equal(decode(file), expected)


def test_own_pictures_have_no_limits_of_uploads(tmp_path):
    large = Image.new("RGB", (6000, 5000), "red")  # 30 million pixels; open_image ends at 24
    large.save(tmp_path / "large.jpg")
    assert decode(tmp_path / "large.jpg").size == (6000, 5000)  # and not at an eighth of it
