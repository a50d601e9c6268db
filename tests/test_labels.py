"""What labels mean: names of classes in data and models, and which images are held out (train/data)."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_config
from data_fixtures import encode, files, load, picture, pictures, refusal  # noqa: F401, some are fixtures

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import data
from data.folders import mixed


# ---- where names come from ---------------------------------------------------------------------------------


def test_names_of_classes_are_text_however_accents_are_written(load, refusal, tmp_path):
    train = load(files(tmp_path / "train", {"cafe\u0301/0.png": picture(0), "tea/1.png": picture(1)}))
    test = load(files(tmp_path / "test", {"caf\u00e9/0.png": picture(0), "tea/1.png": picture(1)}))
    assert train.classes == test.classes == ("caf\u00e9", "tea")
    folder = files(tmp_path / "old", {"a/0.png": picture(0)})
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    (folder / "a/0.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9/0.png"))
    assert "a folder 'caf\\udce9', whose name is not in UTF-8: rename it." in refusal(folder)


def test_odd_metadata_and_labels_of_a_table_are_told(load, refusal, tmp_path):
    path, made = tmp_path / "a.parquet", pa.table({"img": [encode(pixels) for pixels in pictures(2)], "label": [1, 0]})
    for note in ("null", "[]", '{"info": null}', '{"info": {"features": {"label": {"names": null}}}}'):
        pq.write_table(made.replace_schema_metadata({"huggingface": note}), path)
        assert load(path).classes is None
    pq.write_table(made.replace_schema_metadata({"huggingface": "{"}), path)
    assert "its metadata `huggingface`, which may name the classes, are no JSON" in refusal(path)
    pq.write_table(made.set_column(1, "label", pa.array([0, 2**63], pa.uint64())), path)
    assert "the column `label` holds no labels" in refusal(path)


def test_the_folder_that_is_named_decides_what_the_labels_are(load, tmp_path):
    """Of the same pictures, in an order that may be the same."""
    for i in range(20):
        folder = files(tmp_path / str(i), {f"x/{name}.png": picture(j + 3 * i) for j, name in enumerate(("a/0", "b/1", "b/2"))})
        assert load(folder).classes == ("x",) and load(folder).labels.tolist() == [0, 0, 0]
        assert sorted(load(folder / "x").labels.tolist()) == [0, 1, 1]


def test_some_files_alone_may_name_the_classes(load, refusal, tmp_path):
    """Those of sample.py did not, before."""
    (tmp_path / "set").mkdir()
    for i, names in enumerate((None, ["cat", "dog"], ["cow", "dog"])):
        features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
        made = pa.table({"image": [encode(picture(i))], "label": [1]})
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        if i == 2:
            assert load(tmp_path / "set").classes == ("cat", "dog")
        pq.write_table(made, tmp_path / f"set/train-{i}.parquet")
    assert "differ in the names of their columns or classes" in refusal(tmp_path / "set")


# ---- whose labels are which --------------------------------------------------------------------------------


def images_of(labels, classes=None) -> data.Images:
    return data.Images(torch.from_numpy(pictures(len(labels))), torch.tensor(labels), classes)


def test_a_checksum_of_pixels_and_labels_in_order():
    pixels, labels = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3), torch.tensor([1, 0])
    bytes_of_both = bytes(i % 256 for i in range(384)) + (1).to_bytes(8, "little") + bytes(8)
    assert data.Images(pixels, labels).checksum() == hashlib.sha256(bytes_of_both).hexdigest()
    assert data.Images(pixels, None).checksum() == hashlib.sha256(bytes_of_both[:384]).hexdigest()
    assert data.Images(pixels, labels)[[1, 0]].checksum() != data.Images(pixels, labels).checksum()


def test_names_of_classes_decide_which_label_is_which(capsys):
    model = ("cat", "dog", "owl")
    assert data.match_labels(images_of([0, 1]), ("0", "1"), "x").labels.tolist() == [0, 1]
    assert capsys.readouterr().err == ""
    assert data.match_labels(images_of([2, 0]), model, "x").labels.tolist() == [2, 0]
    said = "The data do not name their classes: their labels are taken for the model's, 0 for cat, 1 for dog, 2 for owl.\n"
    assert capsys.readouterr().err == said
    own = data.match_labels(images_of([1, 0, 1], ("owl", "cat")), model, "x")
    assert own.labels.tolist() == [0, 2, 0] and own.classes == model
    older = ("cafe\u0301", "tea")  # accents apart
    same = data.match_labels(images_of([1, 0], ("caf\u00e9", "tea")), older, "x")
    assert same.labels.tolist() == [1, 0]
    assert data.match_labels(images_of([1, 0], ("tea", "caf\u00e9")), older, "x").labels.tolist() == [0, 1]
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


def test_a_model_takes_the_names_of_the_data(capsys):
    config = small_config("dmol", "class")
    assert data.with_classes(config, images_of([0]), True) is config
    assert data.with_classes(config, images_of([0], ("a", "b", "c")), False).classes == ("a", "b", "c")
    assert data.with_classes(small_config("dmol", "sr"), images_of([0], ("a", "b")), True).classes == ()
    assert capsys.readouterr().err == ""
    for labels, fresh in (([1, 2, 3], True), ([0, 4_000_000_000], True), ([0, 1, 2], False)):  # refused by `check_labels`
        assert data.with_classes(config, images_of(labels), fresh) is config
    assert capsys.readouterr().err == ""
    assert data.with_classes(config, images_of([2, 0, 1, 0]), True).classes == ("0", "1", "2")
    assert capsys.readouterr().err == "The data do not name their 3 classes: they are called 0 to 2.\n"
    with pytest.raises(SystemExit, match="must differ from each other"):
        data.with_classes(config, images_of([0], ("a", "a")), True)


@pytest.mark.parametrize("sizes", [(2, 1), (4, 1), (19, 1), (2, 2), (3, 3, 3), (2,) + 9 * (1,), (1, 1), (100, 10, 2, 1)])
def test_classes_of_a_folder_are_spread_so_that_all_are_trained_on(sizes, capsys):
    for seed in range(20):  # whatever the pictures are called
        paths = [f"{label}/{seed}-{i}.png" for label, size in enumerate(sizes) for i in range(size)]
        order = mixed(paths, lambda path: path.split("/")[0])
        assert sorted(order) == sorted(paths) and order == mixed(paths[::-1], lambda path: path.split("/")[0])
        labels = [int(path.split("/")[0]) for path in order]
        train, held_out = data.hold_out(images_of(labels), data.validation_size(len(labels), 2000))
        assert train.labels.unique().tolist() == list(range(len(sizes))) or sizes == (1, 1)
    assert (capsys.readouterr().err == "") == (sizes != (1, 1))


def test_a_class_that_is_held_out_whole_is_told(capsys):
    data.hold_out(images_of([0, 1, 0, 1, 0, 2, 2], ("a", "b", "c")), 3)
    told = capsys.readouterr().err
    assert told.startswith("All pictures of c are among the last 3, which are held out: the model will not learn of them.")


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
    with pytest.raises(SystemExit, match="^There is one image alone.*give two at least.$"):
        data.hold_out(images_of([0]), data.validation_size(1, 2000))
