"""train/figures.py and train/gallery.py: every picture on a sheet is the one that its labels say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, SOURCE, small
from PIL import Image

from imtx import ImageTransformer, draw
from imtx.demo.gallery import sheets
from imtx.demo.models import GENERATOR, UPSCALER
from imtx.images import square_crop

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import figures
import gallery

OBJECTS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SEEDS = ("0 to 9", "10 to 19", "20 to 29")  # of a row of objects
FACES = ["collins", "espinasse", "hopper", "jerusalem"]


@pytest.fixture
def laid_out(monkeypatch) -> list[tuple]:
    """What the sheets from now on are made of: title, names of columns, (name, pictures) of rows."""
    made = []

    def record(*parts) -> np.ndarray:
        made.append(parts)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(figures, "labelled_sheet", record)
    return made


def example(kind: str, name: str) -> np.ndarray:
    (file,) = (ROOT / "assets/examples" / kind).glob(f"{name}.*")
    with Image.open(file) as image:
        return square_crop(image.convert("RGB"), SIZE)


# ---- the sheet ---------------------------------------------------------------------------------------------


def test_pictures_stand_under_their_columns_beside_their_rows():
    colours = np.random.default_rng(0).permutation(np.arange(1, 13) * 20).reshape(3, 4).astype(np.uint8)
    rows = []
    for i in range(3):
        pictures = np.zeros((4, 5, 5, 3), np.uint8)
        pictures[..., 0] = colours[i][:, None, None]  # no label has a colour without green
        pictures[:, 0, 1, 2] = 255  # one pixel of each
        rows.append((f"row {i}", pictures))
    sheet = figures.labelled_sheet("a title", ["one", "two\nlines", "three", "four"], rows)

    side, places = 5 * figures.SCALE, {}
    for value in colours.flatten():
        ys, xs = ((sheet[..., 0] == value) & (sheet[..., 1] == 0)).nonzero()
        places[int(value)] = ys.min(), xs.min()
        assert len(ys) == side * side and (ys.max() - ys.min(), xs.max() - xs.min()) == (side - 1, side - 1)
    tops = np.array([[places[int(value)][0] for value in row] for row in colours])
    lefts = np.array([[places[int(value)][1] for value in row] for row in colours])
    assert (tops == tops[:, :1]).all() and (np.diff(tops[:, 0]) == side + figures.GAP).all()
    assert (lefts == lefts[0]).all() and (np.diff(lefts[0]) == side + figures.GAP).all()
    blue = np.argwhere(sheet[tops[0, 0] :][:side, lefts[0, 0] :][:, :side, 2] == 255)
    assert blue.min(axis=0).tolist() == [0, figures.SCALE] and len(blue) == figures.SCALE**2  # enlarged, not blurred

    dark = sheet.max(axis=2) < 100
    for i in range(3):  # a label in the margin beside each row, none between
        assert dark[tops[i, 0] : tops[i, 0] + side, : lefts[0, 0]].any()
        assert not dark[tops[i, 0] - figures.GAP : tops[i, 0], : lefts[0, 0]].any()
    for i in range(4):  # and above each column
        assert dark[tops[0, 0] - 25 : tops[0, 0], lefts[0, i] : lefts[0, i] + side].any()


# ---- what is drawn -----------------------------------------------------------------------------------------


def test_samples_by_class_and_temperature(laid_out):
    model = small("dmol", "class")
    figures.by_class("mine", model, [{"temperature": t, "guidance": 5.0} for t in (0.7, 0.8, 0.9, 1.0)])
    ((title, columns, rows),) = laid_out
    assert title.startswith("mine: ") and columns == list(CLASSES) and len(rows) == 8
    for number, (name, pictures) in enumerate(rows):
        temperature, first = (0.7, 0.8, 0.9, 1.0)[number // 2], number % 2 * 2
        assert name == f"temperature {temperature}\nguidance 5.0\nseeds {first} to {first + 1}"
        for label in range(2):
            expected = draw(model, [first + label], labels=[label], temperature=temperature, guidance=5.0)
            assert np.array_equal(pictures[label], expected[0].numpy())


def test_a_model_without_classes_has_samples_too(laid_out, monkeypatch):
    monkeypatch.setattr(figures, "MOST_COLUMNS", 3)
    model = small("dmol", "unconditional")
    assert list(figures.sheets("mine", model)) == ["mine-classes.png", "mine-completions.png"]  # nothing to guide towards
    (_, columns, rows), _ = laid_out
    assert columns == [""] * 3 and rows[1][0] == "temperature 0.7\nseeds 3 to 5"
    assert np.array_equal(rows[1][1], draw(model, [3, 4, 5], temperature=0.7).numpy())


@pytest.mark.parametrize("layout, kept", [({}, 4), (dict(layout="2d", query_block=(2, 4), memory_block=(2, 2)), 4)])
def test_completions_keep_what_is_given(laid_out, layout, kept):
    model = small("dmol", "class", **layout)
    figures.completions("mine", model)
    ((title, columns, rows),) = laid_out
    assert f"{kept} of {SIZE} rows given" in title and columns == OBJECTS
    assert [name for name, _ in rows] == ["given", *(f"no class\nseeds {seeds}" for seeds in SEEDS), "truth"]  # it knows cat and dog
    truths = rows[-1][1]
    for i, name in enumerate(OBJECTS):
        assert np.array_equal(truths[i], example("objects", name))
    for _, pictures in rows:
        assert np.array_equal(pictures[:, :kept], truths[:, :kept])
    assert (rows[0][1][:, kept:] == figures.EMPTY).all()
    options = dict(given=torch.from_numpy(truths[3]), given_pixels=kept * SIZE, temperature=0.9)
    assert np.array_equal(rows[3][1][3], draw(model, [23], **options)[0].numpy())


def test_completions_of_a_model_that_knows_the_objects_are_of_their_classes_too(laid_out):
    model = small("dmol", "class", classes=tuple(reversed(OBJECTS)))
    figures.completions("mine", model)
    ((title, _, rows),) = laid_out
    assert "classes with guidance 5" in title
    assert [name for name, _ in rows[4:7]] == [f"its class\nseeds {seeds}" for seeds in SEEDS]
    options = dict(given=torch.from_numpy(rows[-1][1][3]), given_pixels=4 * SIZE, temperature=0.9)
    expected = draw(model, [23], labels=[model.config.classes.index(OBJECTS[3])], guidance=5.0, **options)
    assert np.array_equal(rows[6][1][3], expected[0].numpy())


def test_a_model_that_cannot_keep_a_half_has_no_sheet_of_completions(laid_out):
    model = small("dmol", "class", layout="2d", query_block=(8, 4), memory_block=(0, 4))
    assert list(figures.sheets("mine", model)) == ["mine-classes.png", "mine-guidance.png"]
    (*_, temperatures), (*_, guidances) = laid_out
    assert [name.split("\n")[1] for name, _ in guidances] == [f"guidance {g}" for g in (1, 3, 5, 8) for _ in range(2)]
    assert np.array_equal(guidances[4][1], temperatures[6][1])  # temperature 1 and guidance 5 on both


@pytest.mark.parametrize("name, kind, names", [("faces-mine", "faces", FACES), ("mine", "objects", OBJECTS)])
def test_an_upscaler_gets_portraits_or_objects_by_its_name(laid_out, name, kind, names):
    model = small("dmol", "sr")
    assert list(figures.sheets(name, model)) == [f"{name}-super-resolution.png"]
    ((_, columns, rows),) = laid_out
    assert [row for row, _ in rows] == names and [len(pictures) for _, pictures in rows] == [9] * len(names)
    assert columns[0].startswith(f"{SOURCE}x{SOURCE}") and columns[-1] == "\ntruth"
    truth = example(kind, names[1])
    source = torch.from_numpy(truth).double().unfold(0, 4, 4).unfold(1, 4, 4).mean(dim=(3, 4))
    source = (source + 0.5).floor().to(torch.uint8)
    pictures = rows[1][1]
    assert np.array_equal(pictures[-1], truth)
    assert np.array_equal(pictures[0], source.numpy().repeat(4, axis=0).repeat(4, axis=1))
    assert 0 < np.abs(pictures[1].astype(int) - pictures[0]).max() < 100  # bicubic: near it, and not it
    for place, (temperature, seed) in enumerate([(0.8, 0), (0.8, 1), (0.9, 0), (0.9, 1), (1.0, 0), (1.0, 1)], start=2):
        assert columns[place] == f"temp. {temperature}\nseed {seed}"
        expected = draw(model, [seed], sources=source, temperature=temperature)
        assert np.array_equal(pictures[place], expected[0].numpy())


# ---- the commands ------------------------------------------------------------------------------------------


def test_every_installed_model_gets_its_sheets(tmp_path, capsys):
    for name, task in (("cats", "class"), ("faces-up", "sr"), ("up", "sr")):
        small("dmol", task).float().save_pretrained(tmp_path / "weights" / name)
    figures.main(["--output", str(tmp_path / "new/out"), "--weights", str(tmp_path / "weights")])
    names = ["cats-classes", "cats-completions", "cats-guidance", "faces-up-super-resolution", "up-super-resolution"]
    files = [tmp_path / "new/out" / f"{name}.png" for name in names]
    assert sorted((tmp_path / "new/out").iterdir()) == files
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    heights = [Image.open(file).height for file in files]
    assert heights[4] - heights[3] == 6 * (SIZE * figures.SCALE + figures.GAP)  # ten objects, four faces


def test_refusals_name_the_option(tmp_path):
    small("dmol", "sr").float().save_pretrained(tmp_path / "weights/up")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"--weights: {tmp_path} holds no model folder"):
        figures.main(["--output", str(tmp_path / "out"), "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match="--output: .*file cannot be written to: File exists"):
        figures.main(["--output", str(tmp_path / "file"), "--weights", str(tmp_path / "weights")])


def test_the_page_has_every_sheet_those_of_its_defaults_first():
    found = sheets(ROOT / "assets/figures", (GENERATOR, UPSCALER))
    assert {path for path, _ in found} == {str(path) for path in (ROOT / "assets/figures").iterdir()}
    names = [caption.partition(": ")[0] for _, caption in found]
    assert names[:4] == [GENERATOR] * 3 + [UPSCALER]
    assert all(Path(path).stem.startswith(f"{name}-") for (path, _), name in zip(found, names))
    assert found[0][1] == f"{GENERATOR}: by class and temperature"


def test_the_bundled_gallery_is_what_the_command_writes(tmp_path, monkeypatch):
    """In texts and sizes: the last bit of a colour may differ from machine to machine."""
    monkeypatch.setattr(gallery, "GALLERY", tmp_path)
    gallery.main()
    bundled = ROOT / "assets/gallery"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in bundled.iterdir()}
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((bundled / path.name).read_text())
        else:
            assert Image.open(path).size == Image.open(bundled / path.name).size
    generator = ImageTransformer.from_pretrained("cifar10-dmol-1d")
    row = np.asarray(Image.open(tmp_path / "generate.png")).reshape(32, 10, 32, 3)
    assert np.array_equal(row[:, 9], draw(generator, [9], labels=[9], temperature=1.0, guidance=5.0)[0].numpy())  # truck
