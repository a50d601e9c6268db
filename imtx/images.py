"""Pictures in and out: safe decoding of uploads, the crop and the reduction that training used, PNG files.

Pixels are uint8 arrays of shape (height, width, 3), RGB.
"""

import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

MAX_BYTES = 8_000_000
MAX_PIXELS = 24_000_000  # decoded, about 100 MB
MAX_ZOOM = 8.0
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # "JPEG" covers MPO; Pillow does not know it by name
# What Pillow raises for bytes that are no picture, or a broken one: the first three in 60,000 files with bytes changed
# at random, the others in parts of Pillow that read metadata.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


class BadImage(ValueError):
    """A picture cannot be used. The message is one sentence for whoever sent it, and names no path."""


def open_image(path: str | Path) -> Image.Image:
    """An upright 8-bit RGB picture: first frame, EXIF rotation applied, transparency over white.

    Raises BadImage, and OSError where there is no file to be read. The size is checked before anything is decoded: a few kB
    of PNG can hold gigabytes of pixels.
    """
    if os.path.getsize(path) > MAX_BYTES:
        raise BadImage(f"This file is too large: send a picture of at most {MAX_BYTES // 10**6} MB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, stricter limit follows
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(_too_large()) from error
    except DAMAGE as error:
        raise BadImage("This is not a picture that can be read: send a PNG, JPEG, WebP, GIF, BMP or TIFF.") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"This picture of {width}x{height} pixels is too large: {_too_large()}")
        image.draft("RGB", (1024, 1024))  # a large JPEG is decoded at an eighth to a half of its size
        try:
            image.load()
            turned = upright(image)
        except DAMAGE as error:
            raise BadImage("This picture is damaged or cut short: send the whole file again.") from error
    return to_rgb(turned)


def _too_large() -> str:
    return f"send one of at most {MAX_PIXELS // 10**6} million pixels."


def upright(image: Image.Image) -> Image.Image:
    """As `ImageOps.exif_transpose`, which also writes all EXIF anew and so fails on fields unrelated to rotation."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image.copy() if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in 8-bit RGB, transparency over white. Raises BadImage for colours that have no such form."""
    if image.mode.startswith("I"):  # 16 bits: rescaled, as a plain conversion would cut off at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage("This picture has values beyond 16 bits: send one of 8 or 16 bits a colour.")
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("F", "LAB"):  # fractions have no agreed white, and Pillow cannot turn LAB into RGB
        raise BadImage("The colours of this TIFF cannot be read: send it as a PNG or JPEG.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square_crop(image: Image.Image, size: int = 32, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    """A square of side min(width, height) / zoom, resized with Lanczos: (size, size, 3) uint8.

    x and y in 0..1 place it between left and right, top and bottom. A picture of that size comes back as it is.
    Raises ValueError for a zoom or a place out of range.
    """
    if not 1 <= zoom <= MAX_ZOOM:
        raise ValueError(f"Zoom must be from 1 to {MAX_ZOOM:g}, got {zoom}.")
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"The place of the crop must be from 0 to 1, got {x}, {y}.")
    if image.size == (size, size) and zoom == 1:
        return np.array(image)
    side = min(image.size) / zoom
    left, top = (image.width - side) * x, (image.height - side) * y
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def area_means(pixels: np.ndarray, factor: int = 4) -> np.ndarray:
    """Rounded means of squares of factor x factor pixels: (..., h, w, 3) -> (..., h / factor, w / factor, 3) uint8.

    This is the definition of a super-resolution source, in training and in the demo. Exact integer arithmetic.
    Raises TypeError for another dtype, ValueError for sides that the factor does not divide.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}.")
    *rest, height, width, channels = pixels.shape
    if height % factor or width % factor:
        raise ValueError(f"factor {factor} must divide the sides {height} and {width}.")
    cells = pixels.reshape(*rest, height // factor, factor, width // factor, factor, channels)  # (..., h / f, f, w / f, f, 3)
    return ((cells.sum(axis=(-4, -2), dtype=np.uint32) + factor**2 // 2) // factor**2).astype(np.uint8)


def source_and_truth(image: Image.Image, source_size: int = 8, size: int = 32) -> tuple[np.ndarray, np.ndarray | None]:
    """The source of a picture, (source_size, source_size, 3) uint8, and the truth, (size, size, 3) uint8.

    A picture of the source's size is itself the source, and the truth None.
    """
    if image.size == (source_size, source_size):
        return np.array(image), None
    truth = square_crop(image, size)
    return area_means(truth, size // source_size), truth


def enlarge(pixels: np.ndarray, factor: int, resample: Image.Resampling) -> np.ndarray:
    """(h, w, 3) -> (h factor, w factor, 3) uint8."""
    image = Image.fromarray(pixels)
    return np.array(image.resize((image.width * factor, image.height * factor), resample))


def save_png(pixels: np.ndarray, path: Path) -> None:
    """An exact PNG of (h, w, 3) uint8, complete under its name or not there."""
    temporary = path.with_name(f".{path.name}.part")
    Image.fromarray(pixels).save(temporary, "png")
    os.replace(temporary, path)


def sheet(pictures: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """(N, h, w, 3) -> one contact sheet on white, row by row, each pixel shown as scale x scale."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap) + gap, i % columns * (width + gap) + gap
        page[top : top + height, left : left + width] = picture
    return page.repeat(scale, axis=0).repeat(scale, axis=1)
