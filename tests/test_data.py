"""What --data may name: parquet and folders of pictures, on small data made here."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_config
from PIL import Image
from data_fixtures import SIZE, picture, pictures, encode, files, load, refusal, decoded, assert_images, entries, table  # noqa: F401, some are fixtures
from test_train import write

from imtx import PRESETS, ImageTransformer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import data
from data.pictures import area_resize, fit


# ---- parquet -----------------------------------------------------------------------------------------------


def test_columns_are_of_tables(tmp_path):
    (tmp_path / "1.png").touch()
    for option in ("image_column", "label_column"):
        with pytest.raises(SystemExit, match="a folder of pictures, which has no column img: leave that option out"):
            data.find(str(tmp_path), "train", **{option: "img"})


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
    assert refusal(tmp_path / "nothing") == (
        f"There is no file or folder {tmp_path}/nothing. (A data set on the Hugging Face Hub is named OWNER/NAME.)"
    )


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


def test_pictures_that_are_not_read_are_named_and_not_passed_over(load, refusal, tmp_path, capsys):
    contents = {"cat/0.jfif": encode(picture(0)), "cat/1.HEIC": b"....ftypheic", "dog/2.avif": b"....ftypavif", "dog/3.txt": b""}
    folder = files(tmp_path / "set", contents)
    images = load(folder)
    assert by_name(images, {"0": picture(0)}) == ["0"] and images.classes == ("cat", "dog")
    told = capsys.readouterr().err
    assert f"{folder}/cat/1.HEIC" in told and f"{folder}/dog/2.avif" in told and "3.txt" not in told
    assert "this is no PNG, JPEG, WebP, GIF, BMP or TIFF picture" in refusal(folder, "--strict")


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
        said = refusal(folder, split=split)
        assert said.startswith(f"{folder} holds no {split}-*.parquet file and no picture. ") and f"{folder}/CLASS/1.png" in said
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


def test_links_are_followed_unless_they_lead_nowhere_or_back(load, refusal, tmp_path, capfd):
    elsewhere = files(tmp_path / "elsewhere", {"1.png": picture(1)})
    folder = files(tmp_path / "set", {"cat/0.png": picture(0)})
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat/gone.png").symlink_to(tmp_path / "gone.png")
    images = load(folder)
    assert sorted(images.labels.tolist()) == [0, 1] and images.classes == ("cat", "dog")
    said = capfd.readouterr().err
    assert "Skipped 1 of 3 pictures:" in said and f"{folder}/cat/gone.png: there is no such file" in said
    Image.fromarray(picture(2)).save(tmp_path / "gone.png")  # which is another set then
    assert len(load(folder)) == 3
    (folder / "dog/back").symlink_to(elsewhere.parent)
    assert refusal(folder) == f"{folder}/dog/back leads back to {tmp_path}, which it lies in: remove that link."
    two = files(tmp_path / "two", {"cat/0.png": picture(0), "dog/1.png": picture(1)})
    (two / "cat/link").symlink_to(two / "dog")
    assert len(load(two)) == 3
    (two / "dog/link").symlink_to(two / "cat")
    assert "/link leads back to " in refusal(two)


def test_a_run_s_folder_may_not_lie_among_pictures(tmp_path):
    folder = files(tmp_path / "set", {"cat/0.png": picture(0)})
    assert data.lies_among_pictures(folder / "run", str(folder)) and data.lies_among_pictures(folder, str(folder))
    assert not data.lies_among_pictures(tmp_path / "run", str(folder))
    assert not data.lies_among_pictures(folder / ".runs/1", str(folder))
    write(tmp_path / "train-0.parquet", pictures(3))
    assert not data.lies_among_pictures(tmp_path / "run", str(tmp_path))


# ---- pictures that cannot be used --------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_no_damaged_picture(load, refusal, tmp_path, monkeypatch):
    """Skipped, it would stay so in the cache when it can be read again."""
    folder = files(tmp_path / "set", {"cat/0.png": picture(0), "cat/1.png": picture(1)})
    read = Path.read_bytes

    def closed(path):
        if path.name == "1.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", closed)
        assert refusal(folder) == f"{folder}/cat/1.png: the file cannot be read: Permission denied."
    assert len(load(folder)) == 2


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
        assert "Skipped 3 of 10 pictures:\n" in said and "more" not in said
        assert all(f"\n  {names[i]}: {reason}" in said for i, reason in zip((2, 5, 7), reasons)), said
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
    assert "b.parquet, row 0: there is no picture in it\n" in capfd.readouterr().err


def test_if_none_can_be_used_that_is_an_error(refusal, tmp_path):
    folder = files(tmp_path / "set", {"a.png": b"hello"})
    assert refusal(folder) == (
        f"{folder} holds no image that can be used:\n  {folder}/a.png: this is no PNG, JPEG, WebP, GIF, BMP or TIFF picture"
    )


def test_of_many_unusable_pictures_a_handful_is_named(load, capfd, tmp_path):
    folder = files(tmp_path / "set", {f"{i}.png": b"hello" for i in range(8)} | {"good.png": picture(0)})
    for _ in range(2):  # decoded, then from the cache
        load(folder)
        said = capfd.readouterr().err
        assert said.count("this is no PNG") == 5 and said.endswith("\n  and 3 more\n")


def test_celeba_crop_is_an_option_for_aligned_pictures_only(load, refusal, tmp_path):
    pixels = picture(0, 178, 218)
    folder = files(tmp_path / "set", {"000001.png": pixels})
    assert_images(load(folder, "--celeba-crop"), [area_resize(pixels[40:178, 20:158], SIZE)])
    assert_images(load(folder), [area_resize(pixels[20:198], SIZE)])
    files(folder, {"a.png": picture(0)})
    assert f"{folder}/a.png: the picture is 8x8, and --celeba-crop is for" in refusal(folder, "--celeba-crop")


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
    assert f"Skipped 1 of 13 pictures:\n  {tmp_path}/set/train/ant/broken.png" in done.stderr
    model = ImageTransformer.from_pretrained(tmp_path / "run/model")
    assert model.config.classes == ("ant", "zebra") and len(PRESETS["tiny"].classes) == 10
    done = command("train/evaluate.py", *options, "--checkpoint", tmp_path / "run/model")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 4 and result["likelihood"] == "p(image | class)"
    assert len(entries(tmp_path / "cache")) == 2
