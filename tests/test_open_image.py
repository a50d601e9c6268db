"""Files of every kind are read, or refused in one sentence."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from imtx.images import MAX_BYTES, MAX_ZOOM, BadImage, open_image, square_crop

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
TURNED = 6  # EXIF orientation of a phone held upright


def noisy(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """What JPEG keeps: a ramp of red from left to right, of green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    return pixels


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    """A PNG of any header, however little data it has."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """A GIF whose frame may be larger than its screen."""
    head = b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x02\x02\x4c\x01\0;"


def tiff_of_large_tiles() -> bytes:
    """4x4 pixels in one tile of 60000x60000."""
    tags = {256: 4, 257: 4, 258: 8, 259: 5, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 200, 325: 20}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(220, b"\0")


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, name: str = "upload.png") -> np.ndarray:
        path = tmp_path / name
        path.write_bytes(data)
        image = open_image(path)
        assert image.mode == "RGB"
        return np.asarray(image)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """The sentence with which an upload is refused."""

    def refusal(data: bytes, name: str = "upload.png") -> str:
        with pytest.raises(BadImage) as caught:
            read(data, name)
        sentence = str(caught.value)
        assert "send" in sentence and sentence.endswith(".") and "\n" not in sentence, "names what to do"
        assert str(tmp_path) not in sentence and name not in sentence, "no path of the server"
        return sentence

    return refusal


@pytest.fixture
def no_decoding(monkeypatch):
    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    monkeypatch.setattr("PIL.Image.Image.load", load)


# Pictures that are read


@pytest.mark.parametrize(
    "format, options",
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_exact_formats_keep_every_pixel(read, format, options):
    pixels = noisy(9, 7)
    assert np.array_equal(read(encoded(Image.fromarray(pixels), format, **options)), pixels)


@pytest.mark.parametrize("format, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("MPO", {}), ("WEBP", {})])
def test_lossy_formats_are_close(read, format, options):
    pixels = smooth(64, 48)
    got = read(encoded(Image.fromarray(pixels), format, quality=90, **options))
    assert got.shape == pixels.shape and np.abs(got.astype(int) - pixels).mean() < 3


def test_the_name_of_a_file_decides_nothing(read):
    assert read(encoded(Image.new("RGB", (2, 2), RED), "GIF"), "photo.jpeg").tolist() == [[list(RED)] * 2] * 2


def test_a_single_pixel_is_a_flat_picture(read):
    image = Image.fromarray(read(encoded(Image.new("RGB", (1, 1), BLUE), "PNG")))
    for zoom in (1, MAX_ZOOM):
        assert (square_crop(image, 32, zoom) == BLUE).all()


def test_grey(read):
    got = read(encoded(Image.fromarray(np.uint8([[0, 100, 255]])), "PNG"))
    assert got.tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


@pytest.mark.parametrize("dtype, format", [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")])
def test_grey_of_16_bits_is_rescaled_not_cut_off(read, dtype, format):
    levels = np.array([[0, 128, 129, 257, 0x8000, 65535]], dtype)
    got = read(encoded(Image.fromarray(levels), format))
    assert got[0, :, 0].tolist() == [round(v / 257) for v in levels[0].tolist()] == [0, 0, 1, 1, 128, 255]


def test_cmyk(read):
    got = read(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))  # cyan ink
    assert np.abs(got.astype(int) - (0, 255, 255)).max() < 8


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_over_white(read, format):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(*RED, 255), (*RED, 0), (0, 0, 0, 128)])  # opaque, a hidden red, half black
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    got = read(encoded(image, format, **options))
    assert got[0, :2].tolist() == [list(RED), [255] * 3] and abs(int(got[0, 2, 0]) - 127) <= 1


def test_transparent_grey(read):
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 0), (10, 255)])
    assert read(encoded(image, "PNG")).tolist() == [[[255] * 3, [10] * 3]]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_opaque_and_transparent(read, format):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    assert read(encoded(image, format)).tolist() == [[list(RED), list(GREEN)]]
    assert read(encoded(image, format, transparency=1)).tolist() == [[list(RED), [255] * 3]]


def test_an_animation_gives_its_first_frame(read):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    for format in ("GIF", "PNG"):
        got = read(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert (got == RED).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(read, format, orientation):
    """Against Pillow's own, which is right where it does not fail."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(24, 40)), format, exif=exif)
    got = read(data)
    assert np.array_equal(got, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    assert got.shape == ((40, 24, 3) if orientation > 4 else (24, 40, 3))


def test_a_phone_held_upright(read):
    exif = Image.Exif()
    exif[0x0112] = TURNED
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0, 0], stored[1, 0] = RED, GREEN  # the left column as stored is the top row, from right to left
    got = read(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert got.shape == (3, 2, 3) and got[0].tolist() == [list(GREEN), list(RED)]


def test_odd_exif_is_no_reason_to_refuse_a_photo(read):
    """Cameras write all sorts of fields. `ImageOps.exif_transpose` fails on this one, as it writes EXIF anew."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = TURNED, 640
    good = encoded(Image.fromarray(smooth(16, 24)), "JPEG", exif=exif)
    long, text = struct.pack("<HH", 0x0100, 4), struct.pack("<HH", 0x0100, 2)
    if long not in good:
        long, text = struct.pack(">HH", 0x0100, 4), struct.pack(">HH", 0x0100, 2)
    assert good.count(long) == 1
    assert read(good.replace(long, text), "photo.jpg").shape == (24, 16, 3)


def test_large_jpegs_keep_all_the_detail_that_a_zoomed_crop_needs(read):
    got = read(encoded(Image.fromarray(smooth(2400, 3600)), "JPEG"))
    assert min(got.shape[:2]) >= 512
    small = np.asarray(Image.fromarray(smooth(2400, 3600)).resize((got.shape[1], got.shape[0])))
    assert np.abs(got.astype(int) - small).mean() < 3


# Files that are refused


@pytest.mark.parametrize("data", [b"", b"just text\n" * 50, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"])
def test_what_is_no_picture_is_refused(refusal, data):
    assert "not a picture" in refusal(data)


def test_formats_outside_the_list_are_refused(refusal):
    for format in ("PPM", "ICO", "TGA"):
        assert "not a picture" in refusal(encoded(Image.new("RGB", (16, 16)), format))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.5, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_files_cut_short_are_refused(refusal, format, part):
    data = encoded(Image.fromarray(noisy(64, 64)), format)
    refusal(data[: int(part * len(data))])


def test_tiles_far_larger_than_the_picture_are_refused(refusal):
    assert "damaged" in refusal(tiff_of_large_tiles())


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_pictures_without_pixels_are_refused(refusal, size):
    refusal(png(*size, 8, 2, bytes(5)))


def test_levels_that_are_not_understood_are_refused_rather_than_guessed(refusal):
    assert "16 bits" in refusal(encoded(Image.fromarray(np.int32([[70000]])), "TIFF"))
    assert "16 bits" in refusal(encoded(Image.fromarray(np.int32([[-1]])), "TIFF"))
    for image in (Image.fromarray(np.float32([[0.5]])), Image.new("LAB", (2, 2))):
        assert "PNG or JPEG" in refusal(encoded(image, "TIFF"))


def test_the_largest_file_is_read_and_one_byte_more_is_refused(read, refusal):
    data = encoded(Image.new("RGB", (4, 4), RED), "BMP")
    assert read(data.ljust(MAX_BYTES, b"\0")).shape == (4, 4, 3)
    assert "8 MB" in refusal(data.ljust(MAX_BYTES + 1, b"\0"))


@pytest.mark.parametrize(
    "data",
    [
        png(12000, 12000, 1, 0, bytes(1501 * 12000)),  # 18 kB, whole and valid; Pillow only warns of it
        png(12000, 2001, 8, 2, b""),  # just over the limit; Pillow says nothing
        png(60000, 60000, 1, 0, b""),  # Pillow itself refuses
        gif((10, 10), (12000, 12000)),
        gif((10, 10), (60000, 60000)),
    ],
    ids=["warned", "silent", "refused", "gif", "large gif"],
)
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_before_they_are_decoded(refusal, no_decoding, data):
    assert len(data) < 30_000
    start = time.perf_counter()
    assert "24 million pixels" in refusal(data)
    assert time.perf_counter() - start < 1


def test_a_picture_of_the_largest_size_is_read(read):
    assert read(png(6000, 4000, 1, 0, bytes(751 * 4000))).shape == (4000, 6000, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    """Bytes changed at random, most of them in the headers."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = TURNED, "a photo"
    image = Image.fromarray(noisy(24, 20))
    files = [encoded(image, format, exif=exif) for format in ("PNG", "JPEG", "WEBP", "TIFF")]
    files += [encoded(image, "BMP"), encoded(image, "GIF"), encoded(image.quantize(8), "PNG", transparency=0)]
    files += [encoded(image, "TIFF", compression=kind) for kind in ("jpeg", "tiff_lzw")]
    path, chance, refused = tmp_path / "upload", random.Random(0), 0
    for i in range(900):
        data = bytearray(files[i % len(files)])
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(len(data) if chance.random() < 0.4 else 150)] = chance.choice((0, 1, 127, 255))
        path.write_bytes(data)
        try:
            assert open_image(path).mode == "RGB"
        except BadImage:
            refused += 1
    assert 100 < refused < 800, "neither all nor none: the test tests something"
