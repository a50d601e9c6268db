"""train/classifier.py: it learns, the same from the same seed, ends with its budget, and its file is read back whole."""

import json
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pictures, small
from test_train import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import classifier
from classifier import Classifier, fit, predict, varied
from data import Images

ABOUT = {"classes": ["dark", "bright"], "image_size": 8}


def dark_and_bright(images: int, seed: int = 0) -> Images:
    labels = torch.arange(images) % 2
    return Images(pictures(images, seed=seed) // 2 + 127 * labels[:, None, None, None].byte(), labels)


def trained(seed: int = 0, **budget) -> tuple[Classifier, dict]:
    torch.manual_seed(seed)
    model = Classifier(ABOUT)
    budget = {"max_steps": None, "max_minutes": None, **budget}
    return model, fit(model, dark_and_bright(96), dark_and_bright(32, seed=1), seed=seed, autocast=False, **budget)


def test_it_learns_what_it_has_not_seen():
    model, found = trained(max_steps=40)
    assert found["steps"] == 40 and found["validation_images"] == 32 and found["validation_accuracy"] > 0.95
    unseen = dark_and_bright(64, seed=2)
    labels, features = predict(model, unseen.pixels, batch_size=10)
    assert (labels == unseen.labels).double().mean() > 0.95
    assert features.shape == (64, 256) and torch.equal(model.head(features).argmax(dim=1), labels)


def test_the_seed_is_all_there_is_to_chance():
    one, same, other = (trained(seed, max_steps=3)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_the_budget_is_processor_time(monkeypatch):
    clock = count(step=30)  # seconds, at each look
    monkeypatch.setattr(classifier.time, "process_time", lambda: next(clock))
    assert trained(max_minutes=2)[1]["steps"] == 4
    assert trained(max_minutes=2, max_steps=3)[1]["steps"] == 3


def test_variants_are_moved_by_an_eighth_at_most_and_half_of_them_mirrored():
    size, shift = 16, 2
    pixels = pictures(40, size)
    found = []
    for before, after in zip(pixels.numpy(), varied(pixels, torch.Generator().manual_seed(0)).numpy()):
        padded = np.pad(before, ((shift, shift), (shift, shift), (0, 0)), mode="reflect")
        windows = [(y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
        for y, x in windows:
            window = padded[y : y + size, x : x + size]
            found += [(y, x, mirrored) for mirrored in (0, 1) if np.array_equal(window[:, :: 1 - 2 * mirrored], after)]
    assert len(found) == 40  # each is one of the variants
    ys, xs, mirrored = zip(*found)
    assert set(ys) == set(xs) == set(range(2 * shift + 1)) and 10 < sum(mirrored) < 30


def test_a_file_is_read_back(tmp_path):
    model, _ = trained(max_steps=2)
    model.save(tmp_path / "model.safetensors")
    read = Classifier.load(tmp_path / "model.safetensors")
    assert not read.training and read.about == ABOUT and read.classes == ("dark", "bright")
    images = pictures(5)
    assert torch.equal(read(images), model.eval()(images))


@pytest.mark.parametrize("content, sentence", [
    (None, "There is no file .*classifier.py makes one"), (b"{}", "cannot be read as a classifier"),
    ("model", "holds other weights than a classifier's"), ("older", "holds a classifier of other layers"),
])
def test_other_files_are_refused(tmp_path, content, sentence):
    file = tmp_path / "model.safetensors"
    if content == "model":
        small("dmol", "class").save_pretrained(tmp_path)
    elif content == "older":
        older = Classifier(ABOUT)
        older.head = torch.nn.Linear(128, 2)
        older.save(file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=sentence):
        Classifier.load(file)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys):
    def run(*options, labels=True) -> dict:
        write(tmp_path / "train.parquet", pictures(30, 32).numpy(), labels=labels)
        output = tmp_path / "new/classifier.safetensors"
        arguments = ("--data", tmp_path / "train.parquet", "--output", output, *options)
        classifier.main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_command_leaves_a_classifier_that_says_what_it_is(run, tmp_path):
    found = run("--max-steps", 1, "--seed", 3, "--mixed-precision", "bf16")
    assert (found["steps"], found["seed"], found["images"], found["validation_images"]) == (1, 3, 27, 3)
    model = Classifier.load(Path(found["output"]))
    assert len(model.classes) == 10 and model.classes[3] == "cat" and model.about["image_size"] == 32
    assert model.about["validation_accuracy"] == found["validation_accuracy"] and model.about["hardware"]
    assert list((tmp_path / "new").iterdir()) == [Path(found["output"])]


def test_what_the_command_refuses(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="has no column `label`"):
        run("--max-steps", 1, labels=False)
    with pytest.raises(SystemExit):
        run("--max-minutes", 0)
    assert "--max-minutes must be above 0, got 0" in capsys.readouterr().err
    (tmp_path / "new").write_text("")
    with pytest.raises(SystemExit, match="--output: .* cannot be written"):
        run("--max-steps", 1)


def test_an_interrupt_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "fit", interrupted)
    with pytest.raises(SystemExit, match="Interrupted"):
        run()
    assert not list((tmp_path / "new").iterdir())
