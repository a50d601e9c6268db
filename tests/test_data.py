"""What --data may name, how pictures become the model's pixels, and the cache: all on small data made here."""

import argparse
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_config
from PIL import Image
from test_train import write

from imtx import PRESETS, ImageTransformer
from imtx.images import area_means, open_image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import cache
import data
from pictures import NotAligned, Unusable, area_resize, decode, fit

SIZE = 8  # of the model's images


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """(height, width, 3) uint8 of noise: any wrong pixel shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(count: int, first: int = 0) -> np.ndarray:
    return np.stack([picture(seed) for seed in range(first, first + count)])


def encode(pixels: np.ndarray, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def files(folder: Path, contents: dict[str, bytes | np.ndarray]) -> Path:
    """Writes files, and the folders they are in."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else encode(content))
    return folder


@pytest.fixture
def load(tmp_path):
    """load(data, "--option", ...): the images for a model of 8x8, through a cache of the test's own."""

    def load(name, *options, split="train", **config) -> data.Images:
        parser = argparse.ArgumentParser()
        data.add_options(parser, split)
        args = parser.parse_args([*map(str, ("--data", name, "--cache", tmp_path / "cache", *options))])
        return data.load(args.data, args.split, small_config("dmol", "class", **config), **data.options(args))

    return load


@pytest.fixture
def refusal(load):
    def refusal(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as ended:
            load(*arguments, **options)
        return str(ended.value)

    return refusal


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The pictures that are decoded from now on: what an entry of the cache spares."""
    calls = []
    monkeypatch.setattr(cache, "decode", lambda file: calls.append(file) or decode(file))
    return calls


def assert_images(images: data.Images, pixels, labels=None, classes=None) -> None:
    assert images.pixels.dtype == torch.uint8 and np.array_equal(images.pixels.numpy(), pixels)
    assert images.labels is None if labels is None else images.labels.tolist() == list(labels)
    assert images.labels is None or images.labels.dtype == torch.int64
    assert images.classes == classes


# ---- one picture -------------------------------------------------------------------------------------------


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


# ---- parquet -----------------------------------------------------------------------------------------------


def test_a_parquet_file_or_the_files_of_a_split_are_read_in_order(load, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train-00000-of-00002.parquet", pictures(70), labels=[i % 2 for i in range(70)])  # two pieces
    write(folder / "train-00001-of-00002.parquet", pictures(5, 70), labels=[1, 1, 0, 0, 1])
    write(folder / "test.parquet", pictures(3, 90), labels=[0, 1, 0])
    labels = [*(i % 2 for i in range(70)), 1, 1, 0, 0, 1]
    assert_images(load(folder), pictures(75), labels)
    assert_images(load(folder, split="test"), pictures(3, 90), [0, 1, 0])
    assert_images(load(folder, "--split", "test"), pictures(3, 90), [0, 1, 0])
    for split in ("train", "test"):  # a file is taken whatever its name
        assert_images(load(folder / "test.parquet", split=split), pictures(3, 90), [0, 1, 0])
    config = small_config("dmol", "class")
    assert_images(data.load(str(folder), "train", config, 72, cache=tmp_path / "cache"), pictures(72), labels[:72])


def test_a_copy_of_a_hub_repository_is_a_parquet_folder(load, refusal, tmp_path):
    files(tmp_path / "repo", {"README.md": b"", "data/x": b""})
    write(tmp_path / "repo/data/train-0.parquet", pictures(3), column="img", labels=[0, 1, 1])
    write(tmp_path / "repo/data/validation-0.parquet", pictures(2, 5), column="img", labels=False)
    assert_images(load(tmp_path / "repo"), pictures(3), [0, 1, 1])
    assert_images(load(tmp_path / "repo", "--split", "validation"), pictures(2, 5))
    assert "holds no test-*.parquet file; it has train, validation" in refusal(tmp_path / "repo", split="test")
    write(tmp_path / "repo/train-0.parquet", pictures(3))
    assert f"in several folders: name one of {tmp_path}/repo, {tmp_path}/repo/data" in refusal(tmp_path / "repo")


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_pictures_are_bytes_with_or_without_a_path(load, tmp_path):
    cells = [encode(pixels) for pixels in pictures(2)]
    assert_images(load(table(tmp_path / "bare.parquet", img=cells)), pictures(2))
    large = pa.array(cells, pa.large_binary())
    assert_images(load(table(tmp_path / "large.parquet", image=large)), pictures(2))
    named = [{"bytes": cells[0], "path": "/no/such/file.png"}, {"bytes": cells[1], "path": None}]
    assert_images(load(table(tmp_path / "named.parquet", image=named)), pictures(2))
    path = str(files(tmp_path, {"loose.png": cells[1]}) / "loose.png")  # a Hub set of loose files
    loose = [{"bytes": cells[0], "path": None}, {"bytes": None, "path": path}]
    assert_images(load(table(tmp_path / "loose.parquet", image=loose)), pictures(2))


def test_columns_are_chosen_by_name(load, refusal, tmp_path):
    cells = [encode(pixels) for pixels in pictures(4)]
    path = table(tmp_path / "a.parquet", left=cells[:2], image=cells[2:], label=[0, 1], fine=[7, 8], name=["a", "b"])
    assert_images(load(path), pictures(2, 2), [0, 1])
    assert_images(load(path, "--image-column", "left", "--label-column", "fine"), pictures(2), [7, 8])
    there = "it has left, image, label, fine, name"
    assert refusal(path, "--image-column", "right") == f"{path} has no column `right`; {there}."
    assert refusal(path, "--label-column", "coarse") == f"{path} has no column `coarse`; {there}."
    assert "the column `name` holds string, not encoded pictures" in refusal(path, "--image-column", "name")
    assert "the column `name` must hold whole numbers" in refusal(path, "--label-column", "name")
    assert_images(load(table(tmp_path / "both.parquet", img=cells[:1], image=cells[1:2])), pictures(1, 1))
    path = table(tmp_path / "b.parquet", left=cells)
    assert refusal(path) == f"{path} has no column `image` or `img`; it has left. --image-column names another."
    path = table(tmp_path / "c.parquet", img=cells, label=[0, None, 1, 1])
    assert "the column `label` must hold whole numbers, and none missing" in refusal(path)


@pytest.mark.parametrize("kind", ["ClassLabel", "Value"])
def test_class_names_come_from_what_datasets_left_in_the_file(kind, load, tmp_path):
    label = {"_type": "ClassLabel", "names": ["dog", "cat"]} if kind == "ClassLabel" else {"_type": kind, "dtype": "int64"}
    note = json.dumps({"info": {"features": {"img": {"_type": "Image"}, "label": label}}})
    made = pa.table({"img": [encode(pixels) for pixels in pictures(2)], "label": [1, 0]})
    pq.write_table(made.replace_schema_metadata({"huggingface": note}), tmp_path / "a.parquet")
    assert_images(load(tmp_path / "a.parquet"), pictures(2), [1, 0], ("dog", "cat") if kind == "ClassLabel" else None)


def test_parquet_files_that_cannot_be_used_are_named(refusal, tmp_path):
    table(tmp_path / "train-0.parquet", image=[encode(picture(0))] * 200, label=[1] * 200)
    whole = (tmp_path / "train-0.parquet").read_bytes()
    files(tmp_path, {"train-0.parquet": whole[:40] + bytes(200) + whole[240:]})
    assert f"{tmp_path}/train-0.parquet cannot be read to its end" in refusal(tmp_path)
    table(tmp_path / "train-1.parquet", image=[encode(picture(0))])
    assert "some of its files have a column `label` and some have none" in refusal(tmp_path)
    table(tmp_path / "train-1.parquet", img=[encode(picture(0))], label=[1])
    assert "differ in the names of their columns" in refusal(tmp_path)
    table(tmp_path / "none.parquet", image=pa.array([], pa.binary()))
    assert refusal(tmp_path / "none.parquet") == f"{tmp_path}/none.parquet holds no image."
    files(tmp_path, {"text": b"hello"})
    assert "text is not a parquet file" in refusal(tmp_path / "text")
    assert refusal(tmp_path / "nothing") == f"There is no file or folder {tmp_path}/nothing."


# ---- folders of pictures -----------------------------------------------------------------------------------


def by_name(images: data.Images, expected: dict[str, np.ndarray]) -> list[str]:
    """Which of the expected pictures each image is."""
    names = {pixels.tobytes(): name for name, pixels in expected.items()}
    return [names[image.numpy().tobytes()] for image in images.pixels]


def test_subfolders_are_classes_in_sorted_order(load, tmp_path):
    contents = {f"{'owl cat dog'.split()[i % 3]}/{i}.png": picture(i) for i in range(30)}
    contents |= {"cat/deeper/x.PNG": picture(40), "dog/x.jpeg": encode(picture(41))}  # a PNG by any name
    others = {"cat/notes.txt": b"", ".hidden/x.png": picture(0), "owl/._0.png": picture(0), "empty/x": b""}
    folder = files(tmp_path / "set", contents | others)
    images = load(folder)
    names = by_name(images, {**contents, "dog/x.jpeg": picture(41)})
    assert sorted(names) == sorted(contents) and images.classes == ("cat", "dog", "owl")
    assert images.labels.tolist() == [("cat", "dog", "owl").index(name.split("/")[0]) for name in names]


def test_the_order_is_mixed_and_the_same_wherever_the_folder_is(load, tmp_path):
    contents = {f"{'cat dog'.split()[i % 2]}/{i}.png": picture(i) for i in range(40)}
    one = load(files(tmp_path / "one", contents))
    other = load(files(tmp_path / "other", dict(reversed(contents.items()))))
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
    train, held_out = data.hold_out(one, 10)
    for part in (train, held_out):
        assert part.labels.unique().tolist() == [0, 1] and part.classes == ("cat", "dog")


def test_a_flat_folder_has_no_classes_and_any_size_will_do(load, tmp_path):
    contents = {"a.png": picture(0), "b.png": picture(1, 20, 12), "c.png": picture(2, 9, 30)}
    images = load(files(tmp_path / "set", contents))
    expected = {name: fit(Image.fromarray(pixels), SIZE) for name, pixels in contents.items()}
    assert sorted(by_name(images, expected)) == ["a.png", "b.png", "c.png"]
    assert images.labels is None and images.classes is None


def test_a_folder_may_be_divided_into_train_and_test(load, refusal, tmp_path):
    contents = {"train/cat/0.png": picture(0), "train/dog/1.png": picture(1), "test/dog/2.png": picture(2)}
    folder = files(tmp_path / "set", contents)
    images = load(folder)
    names = by_name(images, {name: pixels for name, pixels in contents.items()})
    assert sorted(names) == ["train/cat/0.png", "train/dog/1.png"] and images.classes == ("cat", "dog")
    assert_images(load(folder, split="test"), pictures(1, 2), [0], ("dog",))
    assert "has no folder `val`; it has test, train. --split names another." in refusal(folder, "--split", "val")
    files(folder, {"val/3.png": picture(3)})
    assert_images(load(folder, "--split", "val"), pictures(1, 3))
    files(folder, {"plane/3.png": picture(3)})  # is `train` a vehicle?
    assert "holds `test` and `plane`. If both are classes, rename `test`" in refusal(folder)


def test_nothing_is_evaluated_on_what_is_there_to_train_on(load, refusal, tmp_path):
    folder = files(tmp_path / "set", {"cat/0.png": picture(0), "dog/1.png": picture(1)})
    assert len(load(folder)) == 2
    assert "is not divided into `train` and `test`: keep pictures for `test`" in refusal(folder, split="test")
    assert len(load(folder, "--split", "train", split="test")) == 2


def test_folders_that_cannot_be_used_are_named(refusal, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        assert refusal(folder, split=split) == f"{folder} holds no {split}-*.parquet file and no picture."
    files(folder, {"cat/0.png": picture(0), "1.png": picture(1)})
    assert "holds a picture 1.png beside folders with pictures, cat/0.png" in refusal(folder)
    (folder / "1.png").unlink()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("cat"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert refusal(folder) == f"{folder}/cat cannot be read: Permission denied."


# ---- pictures that cannot be used --------------------------------------------------------------------------


@pytest.fixture(params=["folder", "parquet"])
def damaged(request, tmp_path) -> tuple[Path, list[str]]:
    """A set of ten pictures, of which one is cut short, one is none, one too small; and how each is called."""
    contents = [encode(picture(i)) for i in range(10)]
    contents[2], contents[5], contents[7] = contents[2][:100], b"hello", encode(picture(0, 8, 7))
    if request.param == "folder":
        path = files(tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": content for i, content in enumerate(contents)})
        return path, [str(path / f"{'ab'[i % 2]}/{i}.png") for i in range(10)]
    path = table(tmp_path / "set.parquet", image=contents, label=[i % 2 for i in range(10)])
    return path, [f"{path}, row {i}" for i in range(10)]


def test_unusable_pictures_are_skipped_counted_and_named(damaged, load, capfd, monkeypatch):
    path, names = damaged
    reasons = "the picture cannot be decoded: ", "this is no PNG, JPEG", "the picture is 8x7, too small for the model's 8x8"
    for _ in range(2):  # decoded, then from the cache
        images = load(path)
        said = capfd.readouterr().err
        found = [f"Skipped 3 of 10 pictures. The first is {names[i]}: {reason}" for i, reason in zip((2, 5, 7), reasons)]
        assert any(sentence in said for sentence in found), said
    seeds = [i for i in range(10) if i not in (2, 5, 7)]
    kept = by_name(images, {str(i): picture(i) for i in seeds})
    assert sorted(kept) == sorted(map(str, seeds))
    assert images.labels.tolist() == [int(name) % 2 for name in kept]  # each label is still with its picture
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(path)
    assert capfd.readouterr().err == ""  # one process of several says it


def test_strict_ends_at_the_first_of_them(damaged, load, refusal, tmp_path):
    path, names = damaged
    refused = refusal(path, "--strict")
    assert any(refused.startswith(f"{names[i]}: ") for i in (2, 5, 7))
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    load(path)
    assert refusal(path, "--strict") == refused  # also when they have been decoded


def test_a_missing_cell_and_a_missing_file_are_unusable_too(load, capfd, tmp_path):
    cells = [{"bytes": encode(picture(0)), "path": None}, None, {"bytes": None, "path": "/no/such/file.png"}]
    assert_images(load(table(tmp_path / "a.parquet", image=cells)), pictures(1))
    assert "Skipped 2 of 3 pictures" in capfd.readouterr().err
    kind = pa.struct([("bytes", pa.binary())])
    cells = pa.array([{"bytes": None}, {"bytes": encode(picture(0))}], kind)
    assert_images(load(table(tmp_path / "b.parquet", image=cells)), pictures(1))
    assert "b.parquet, row 0: there is no picture in it." in capfd.readouterr().err


def test_if_none_can_be_used_that_is_an_error(refusal, tmp_path):
    folder = files(tmp_path / "set", {"a.png": b"hello"})
    assert refusal(folder) == (
        f"{folder} holds no image that can be used. {folder}/a.png: this is no PNG, JPEG, WebP, GIF, BMP or TIFF picture."
    )


def test_celeba_crop_is_an_option_for_aligned_pictures_only(load, refusal, tmp_path):
    pixels = picture(0, 178, 218)
    folder = files(tmp_path / "set", {"000001.png": pixels})
    assert_images(load(folder, "--celeba-crop"), [area_resize(pixels[40:178, 20:158], SIZE)])
    assert_images(load(folder), [area_resize(pixels[20:198], SIZE)])
    files(folder, {"a.png": picture(0)})
    assert f"{folder}/a.png: the picture is 8x8, and --celeba-crop is for" in refusal(folder, "--celeba-crop")


# ---- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return files(tmp_path / "set", {f"{'ab'[i % 2]}/{i}.png": picture(i, 12, 12) for i in range(6)})


def test_pictures_are_decoded_once(folder, load, decoded, capfd):
    first = load(folder)
    assert len(decoded) == 6 and "Decoded 6 images into " in capfd.readouterr().err
    second = load(folder)
    assert len(decoded) == 6 and capfd.readouterr().err == ""
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    load(folder, image_size=4, query_block=16, memory_block=16)
    assert len(decoded) == 12


def test_a_changed_source_is_decoded_again(folder, load, decoded):
    before = load(folder)
    files(folder, {"a/0.png": picture(50, 12, 12)})
    after = load(folder)
    assert len(decoded) == 12 and (before.pixels != after.pixels).flatten(1).any(dim=1).sum() == 1
    os.utime(folder / "a/0.png", ns=(1, 1))
    load(folder)
    (folder / "b/1.png").rename(folder / "a/1.png")
    assert load(folder).labels.sum() == 2  # and not 3
    assert len(decoded) == 24


def test_each_choice_of_columns_is_an_entry(load, decoded, tmp_path):
    path = table(tmp_path / "a.parquet", left=[encode(picture(0))], image=[encode(picture(1))], label=[0], fine=[5])
    for options in ((), ("--image-column", "left"), ("--label-column", "fine")) * 2:
        images = load(path, *options)
        assert_images(images, pictures(1, 0 if "left" in options else 1), [5 if "fine" in options else 0])
    assert len(decoded) == 3


def test_a_batch_is_a_copy(folder, load):
    images = load(folder)
    batch = images[torch.tensor([3, 0])]
    assert torch.equal(batch.pixels[1], images.pixels[0]) and batch.labels.tolist() == images.labels[[3, 0]].tolist()
    batch.pixels.zero_()
    assert images.pixels[3].any() and load(folder).pixels[3].any()


def test_the_default_cache_is_that_of_the_user(monkeypatch):
    def default() -> Path:
        parser = argparse.ArgumentParser()
        data.add_options(parser, "train")
        return parser.parse_args(["--data", "x"]).cache

    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default() == Path("/some/where/imtx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default() == Path("/home/me/.cache/imtx")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_a_run_that_ends_half_way_leaves_no_entry(folder, load, decoded, monkeypatch, tmp_path):
    def interrupted(*_):
        if decoded:
            raise KeyboardInterrupt
        return fit(*_)

    monkeypatch.setattr(cache, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert entries(tmp_path / "cache") == []
    monkeypatch.setattr(cache, "fit", fit)
    images = load(folder)
    (entry,) = entries(tmp_path / "cache")
    part = entry.rename(entry.with_name(f".{entry.name}.part"))  # what a killed process leaves
    (part / "labels.npy").unlink()
    files(part, {"other": b""})
    assert torch.equal(load(folder).pixels, images.pixels)
    assert entries(tmp_path / "cache") == [entry]
    assert sorted(path.name for path in entry.iterdir()) == ["about.json", "labels.npy", "pixels.npy"]


@pytest.mark.parametrize("name", ["pixels.npy", "labels.npy", "about.json"])
def test_a_damaged_entry_is_named(name, folder, load, refusal, tmp_path):
    load(folder)
    (entry,) = entries(tmp_path / "cache")
    (entry / name).write_bytes((entry / name).read_bytes()[:-20])
    refused = refusal(folder)
    assert refused.startswith(f"{entry} cannot be read: ") and refused.endswith("Delete it, and it is made again.")


def test_a_cache_that_cannot_be_written_is_named(folder, load, refusal, monkeypatch, tmp_path):
    files(tmp_path, {"file": b""})
    refused = refusal(folder, "--cache", tmp_path / "file/cache")
    assert refused.startswith(f"The cache folder {tmp_path}/file/cache cannot be written to: Not a directory. --cache or ")
    load(folder)

    def closed(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", closed)
    assert len(load(folder)) == 6  # what is there can be read
    os.utime(folder / "a/0.png", ns=(1, 1))
    assert "cannot be written to: Permission denied. --cache or" in refusal(folder)


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_is_named_and_left_as_it_was(room, folder, refusal, monkeypatch, tmp_path):
    class Full(io.FileIO):
        def write(self, content) -> int:
            if self.tell() + memoryview(content).nbytes > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(cache, "open", lambda path, mode: Full(path, "w"), raising=False)
    assert "cannot be written to: No space left on device. --cache or" in refusal(folder)
    assert entries(tmp_path / "cache") == []


def test_of_two_processes_one_decodes_and_the_other_waits(folder, load, monkeypatch, tmp_path):
    log = tmp_path / "log"

    def slowly(file):
        with open(log, "a") as opened:
            opened.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return decode(file)

    monkeypatch.setattr(cache, "decode", slowly)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    others = [fork.Process(target=lambda: results.put(load(folder).pixels.numpy().tobytes())) for _ in range(3)]
    for other in others:
        other.start()
    found = [results.get(timeout=60) for _ in others]
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert len(log.read_text().split()) == 6 and len(set(log.read_text().split())) == 1
    assert set(found) == {load(folder).pixels.numpy().tobytes()}


def test_a_killed_process_keeps_nobody_waiting(folder, load, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "decode", lambda file: (tmp_path / "begun").touch() or time.sleep(600))
    killed = multiprocessing.get_context("fork").Process(target=load, args=(folder,))
    killed.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    monkeypatch.setattr(cache, "decode", decode)
    assert len(load(folder)) == 6 and len(entries(tmp_path / "cache")) == 1


# ---- the Hub -----------------------------------------------------------------------------------------------


class FakeDataset:
    """As much of `datasets.Dataset` as is used, over an Arrow table."""

    def __init__(self, rows: pa.Table, fingerprint: str = "0123"):
        self.table, self._fingerprint = rows, fingerprint
        self.features = SimpleNamespace(arrow_schema=rows.schema)

    def __len__(self) -> int:
        return len(self.table)

    def select_columns(self, names: list[str]) -> "FakeDataset":
        return FakeDataset(self.table.select(names))

    def with_format(self, form: str) -> "FakeDataset":
        assert form == "arrow"
        return self

    def iter(self, batch_size: int):
        return (pa.Table.from_batches([batch]) for batch in self.table.to_batches(batch_size))


@pytest.fixture
def hub(monkeypatch):
    """hub({"owner/name": {"train": [table], ...} or an error}): what `datasets` then gives; the fake module."""

    def hub(sets: dict) -> SimpleNamespace:
        def load_dataset(name):
            if isinstance(sets[name], Exception):
                raise sets[name]
            return {split: FakeDataset(*rows) for split, rows in sets[name].items()}

        DatasetsError = type("DatasetsError", (Exception,), {})
        generation = type("DatasetGenerationError", (DatasetsError,), {})
        exceptions = SimpleNamespace(DatasetsError=DatasetsError, DatasetGenerationError=generation)
        fake = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return fake

    return hub


def hub_table(count: int, first: int, names: list[str]) -> pa.Table:
    """As uoft-cs/cifar10 has them."""
    cells = [{"bytes": encode(pixels), "path": None} for pixels in pictures(count, first)]
    note = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})
    labels = [i % len(names) for i in range(count)]
    return pa.table({"img": cells, "label": labels, "id": ["x"] * count}).replace_schema_metadata({"huggingface": note})


def test_a_hub_data_set_is_read_with_datasets(hub, load, refusal, decoded):
    names = ["dog", "cat"]
    sets = {"uoft-cs/cifar10": {"train": [hub_table(70, 0, names)], "valid": [hub_table(3, 90, names)]}}
    hub(sets)
    assert_images(load("uoft-cs/cifar10"), pictures(70), [i % 2 for i in range(70)], ("dog", "cat"))
    assert_images(load("uoft-cs/cifar10", "--split", "valid"), pictures(3, 90), [0, 1, 0], ("dog", "cat"))
    assert refusal("uoft-cs/cifar10", split="test") == (
        "uoft-cs/cifar10 has no split `test`; it has train, valid. --split names another."
    )
    refused = refusal("uoft-cs/cifar10", "--image-column", "image")
    assert refused == "uoft-cs/cifar10 has no column `image`; it has img, label, id."
    load("uoft-cs/cifar10")
    assert len(decoded) == 73
    sets["uoft-cs/cifar10"]["train"] = [hub_table(70, 100, names), "4567"]  # a new revision
    assert_images(load("uoft-cs/cifar10"), pictures(70, 100), [i % 2 for i in range(70)], ("dog", "cat"))


def test_a_folder_of_that_name_comes_first(hub, load, tmp_path, monkeypatch):
    hub({"owner/name": {"train": [hub_table(2, 50, ["cat"])]}})
    files(tmp_path / "owner/name", {"0.png": picture(0)})
    monkeypatch.chdir(tmp_path)
    assert_images(load("owner/name"), pictures(1))


def test_a_damaged_picture_of_the_hub_is_named(hub, load, refusal, capfd):
    cells = [{"bytes": encode(picture(0)), "path": None}, {"bytes": b"hello", "path": None}]
    hub({"some/faces": {"train": [pa.table({"image": cells})]}})
    assert_images(load("some/faces"), pictures(1))
    assert "Skipped 1 of 2 pictures. The first is some/faces, split train, row 1: this is no PNG" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["offline", "unknown", "several configurations", "full disk"])
def test_a_hub_that_gives_nothing_is_a_sentence(kind, hub, refusal):
    sets = {}
    exceptions = hub(sets).exceptions
    generation = exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    generation.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    sets["owner/name"], reason = {
        "offline": (ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"), "Couldn't reach"),
        "unknown": (exceptions.DatasetsError("Dataset 'owner/name' doesn't exist on the Hub."), "doesn't exist on the Hub"),
        "several configurations": (ValueError("Config name is missing."), "Config name is missing"),
        "full disk": (generation, "No space left on device"),
    }[kind]
    refused = refusal("owner/name")
    assert refused.startswith("There is no file or folder owner/name, and from the Hugging Face Hub it cannot be had: ")
    assert reason in refused and ".." not in refused
    assert refused.endswith(". A copy of its parquet files on this machine can be named instead.")


def test_without_datasets_a_sentence_says_what_to_install(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "There is no file or folder uoft-cs/cifar10. " in (refused := refusal("uoft-cs/cifar10"))
    assert refused.endswith("pip install datasets")


# ---- labels and held-out images ----------------------------------------------------------------------------


def images_of(labels, classes=None) -> data.Images:
    return data.Images(torch.from_numpy(pictures(len(labels))), torch.tensor(labels), classes)


def test_names_of_classes_decide_which_label_is_which():
    model = ("cat", "dog", "owl")
    assert data.match_labels(images_of([2, 0]), model, "x").labels.tolist() == [2, 0]
    own = data.match_labels(images_of([1, 0, 1], ("owl", "cat")), model, "x")
    assert own.labels.tolist() == [0, 2, 0] and own.classes == model
    assert data.match_labels(images_of([1, 0], model), (), "x").labels.tolist() == [1, 0]
    for images, sentence in (
        (images_of([0, 3]), "x has labels 0 to 3; the 3 classes are 0..2."),
        (images_of([-1, -1], ("owl", "cat")), "x has labels -1 to -1; the 2 classes are 0..1."),
        (images_of([0, 1], ("cow", "cat")), "x has a class 'cow', which the model has not; its classes are cat, dog, owl."),
        (data.Images(torch.zeros(1, 8, 8, 3), None), "The model has 3 classes, and x has no column `label`"),
    ):
        with pytest.raises(SystemExit) as ended:
            data.match_labels(images, model, "x")
        assert sentence in str(ended.value)


def test_a_model_takes_the_names_of_the_data():
    config = small_config("dmol", "class")
    assert data.with_classes(config, images_of([0])) is config
    assert data.with_classes(config, images_of([0], ("a", "b", "c"))).classes == ("a", "b", "c")
    assert data.with_classes(small_config("dmol", "sr"), images_of([0], ("a", "b"))).classes == ()
    with pytest.raises(SystemExit, match="must differ from each other"):
        data.with_classes(config, images_of([0], ("a", "a")))


def test_the_last_images_are_held_out_unless_they_are_of_one_kind():
    train, held_out = data.hold_out(images_of([0, 1, 0, 1, 2]), 2)
    assert train.labels.tolist() == [0, 1, 0] and held_out.labels.tolist() == [1, 2]
    assert torch.equal(torch.cat([train.pixels, held_out.pixels]), torch.from_numpy(pictures(5)))
    data.hold_out(images_of([0, 0, 0]), 1)
    for labels in ([0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0]):
        with pytest.raises(SystemExit, match="The images lie class after class: the last 2"):
            data.hold_out(images_of(labels), 2)
    with pytest.raises(SystemExit, match="--validation 3 leaves none of the 3 images to train on"):
        data.hold_out(images_of([0, 1, 0]), 3)


# ---- the command lines -------------------------------------------------------------------------------------


def command(script: str, *options) -> subprocess.CompletedProcess:
    """With neither `datasets` nor `gradio`: training needs neither."""
    code = "import runpy, sys; sys.modules.update(datasets=None, gradio=None); sys.path.insert(0, 'train'); "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    line = [sys.executable, "-c", code, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_model_of_ones_own_pictures(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        contents = {f"{'zebra ant'.split()[i % 2]}/{i}.png": picture(i, 40, 36 + i) for i in range(count)}
        files(tmp_path / "set" / split, contents)
    files(tmp_path / "set/train", {"ant/broken.png": b"hello"})
    options = ("--data", tmp_path / "set", "--cache", tmp_path / "cache")
    done = command("train/train.py", *options, "--preset", "tiny", "--output", tmp_path / "run", "--max-steps", 1,
                   "--validation", 4, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    assert f"Skipped 1 of 13 pictures. The first is {tmp_path}/set/train/ant/broken.png" in done.stderr
    model = ImageTransformer.from_pretrained(tmp_path / "run/model")
    assert model.config.classes == ("ant", "zebra") and len(PRESETS["tiny"].classes) == 10
    done = command("train/evaluate.py", *options, "--checkpoint", tmp_path / "run/model")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 4 and result["likelihood"] == "p(image | class)"
    assert len(entries(tmp_path / "cache")) == 2
