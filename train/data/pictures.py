"""One picture for training and evaluation: decoded, cut to a square, reduced to the model's size by means over areas."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from imtx.images import DAMAGE, FORMATS, to_rgb, upright

CELEBA_SIZE = (178, 218)  # width and height of CelebA's aligned pictures
CELEBA_CROP = 138  # the paper's square, in their middle: 20 pixels off the left and right, 40 off the top and bottom


class Unusable(ValueError):
    """A picture cannot be used. The message says why, and leaves it to the caller to say which one."""


class Unreadable(Unusable):
    """The system does not let a file be read, which says nothing of the picture in it."""


class NotAligned(Unusable):
    """A picture is not of the size that CelebA's aligned ones have."""


def decode(file: bytes | Path | None) -> Image.Image:
    """The upright 8-bit RGB picture in a file or its contents (None: there are none).

    As `imtx.images.open_image`, but for one's own data: no limit on bytes or pixels other than Pillow's (179 million
    pixels), and a JPEG is decoded at its full size, as the means over areas need. Raises Unusable, and Unreadable.
    """
    if file is None:
        raise Unusable("there is no picture in it")
    if isinstance(file, Path):
        try:
            file = file.read_bytes()
        except FileNotFoundError as error:
            raise Unusable("there is no such file") from error
        except OSError as error:
            raise Unreadable(f"the file cannot be read: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            image.load()
            return to_rgb(upright(image))
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise Unusable("this is no PNG, JPEG, WebP, GIF, BMP or TIFF picture") from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise Unusable(f"the picture cannot be decoded: {error}") from error


def fit(image: Image.Image, size: int, celeba_crop: bool = False) -> np.ndarray:
    """The largest square in the middle (with `celeba_crop`, the paper's), reduced: (size, size, 3) uint8.

    A picture that has the model's size comes back as it is. Raises Unusable for a smaller one, as pixels that nobody took
    would count as data, and NotAligned for a picture that `celeba_crop` is not meant for.
    """
    width, height = image.size
    side = CELEBA_CROP if celeba_crop else min(width, height)
    if celeba_crop and image.size != CELEBA_SIZE:
        raise NotAligned(f"the picture is {width}x{height}, and --celeba-crop is for CelebA's aligned ones of 178x218")
    if side < size:
        raise Unusable(f"the picture is {width}x{height}, too small for the model's {size}x{size}")
    left, top = (width - side) // 2, (height - side) // 2
    return area_resize(np.asarray(image.crop((left, top, left + side, top + side))), size)


def area_resize(square: np.ndarray, size: int) -> np.ndarray:
    """Means over equal areas, halves rounded up: (side, side, 3) -> (size, size, 3) uint8, for size <= side.

    A pixel across a border counts on both sides by the parts that lie there. (Pillow's box filter counts it whole on one
    side: for 138 -> 32, windows of 4 and 5 pixels in turn.) Where size divides side, this is `imtx.images.area_means`.
    """
    side = len(square)
    if side == size:
        return square
    # In units of 1/size of a pixel all borders, and so all shares, are whole numbers, and the sums below are exact.
    pixel, cell = np.arange(side) * size, np.arange(size)[:, None] * side
    share = (np.minimum(pixel + size, cell + side) - np.maximum(pixel, cell)).clip(0)  # (size, side); a row sums to side
    rows = share.astype(np.float32) @ square.reshape(side, -1).astype(np.float32)  # (size, side * 3), below 2^24
    sums = share.astype(np.float64) @ rows.reshape(size, side, 3)  # (size, size, 3), below 2^53
    return ((sums.astype(np.int64) + side**2 // 2) // side**2).astype(np.uint8)
