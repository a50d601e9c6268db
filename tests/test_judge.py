"""train/judge.py: distances with known answers, shares that can be counted by hand, and what it refuses to judge."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, pictures, small
from test_train import write

from imtx import draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

import judge
from classifier import Classifier, predict
from judge import frechet_distance, in_turn, share

LABELS = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1]  # five of class 0, seven of class 1


def standard(images: int, size: int, seed: int = 0) -> np.ndarray:
    """(images, size) features whose mean is 0 and whose covariance is 1, but for rounding."""
    features = np.random.default_rng(seed).normal(size=(images, size))
    features -= features.mean(axis=0)
    return features @ np.linalg.inv(np.linalg.cholesky(np.cov(features, rowvar=False))).T


# ---- the distance ------------------------------------------------------------------------------------------


def test_the_distance_of_gaussians_along_the_axes():
    features, mean, deviation = standard(50, 4), np.array([3.0, 0.0, -4.0, 1.0]), np.array([2.0, 1.0, 0.5, 0.0])
    expected = (mean**2).sum() + ((deviation - 1) ** 2).sum()  # 26 + 1 + 0 + 0.25 + 1
    assert frechet_distance(features, features * deviation + mean) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(features * deviation + mean, features) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_gaussians_that_lie_askew():
    """Of 2x2 matrices, tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2."""
    one, other = np.array([[4.0, 1.5], [1.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 2.0]])
    sets = [standard(60, 2, seed) @ np.linalg.cholesky(matrix).T for seed, matrix in enumerate((one, other))]
    product = one @ other
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    assert frechet_distance(*sets) == pytest.approx(np.trace(one) + np.trace(other) - 2 * cross, rel=1e-9)


def test_features_of_fewer_pictures_than_dimensions():
    features = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)  # covariances of rank 4
    assert abs(frechet_distance(features, features)) < 1e-6
    assert frechet_distance(features, features + 2) == pytest.approx(80, rel=1e-6)


# ---- the share ---------------------------------------------------------------------------------------------


def test_the_share_and_its_standard_error():
    found, asked = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 2, 2])
    assert share(found, asked) == (pytest.approx(0.6), pytest.approx(math.sqrt(0.24 / 5)))


def test_test_images_are_taken_class_by_class():
    labels = torch.tensor(LABELS)
    assert in_turn(labels, 2, 7).tolist() == [1, 0, 2, 3, 5, 4, 7]
    with pytest.raises(SystemExit, match="only 5 test images: give at most --samples 5"):
        in_turn(labels, 2, 12)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, task in (("generator", "class"), ("plain", "unconditional"), ("upscaler", "sr")):
        small("dmol", task).float().save_pretrained(folder / name)
    torch.manual_seed(0)
    Classifier({"classes": CLASSES, "image_size": SIZE}).save(folder / "classifier.safetensors")
    write(folder / "test.parquet", pictures(12).numpy(), labels=LABELS)
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Runs the command here: what it prints, and the object in its last line."""
    monkeypatch.chdir(files)

    def run(*options) -> tuple[str, dict]:
        arguments = ("--data", "test.parquet", "--classifier", "classifier.safetensors", *options)
        judge.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    return run


def test_the_figures_are_those_of_the_samples_of_each_temperature(run, files):
    printed, result = run("--checkpoint", "generator", "--samples", 5, "--temperatures", 0.5, 1, "--batch-size", 2)
    classifier, model = Classifier.load(files / "classifier.safetensors"), small("dmol", "class").float()
    found, features = predict(classifier, pictures(12))
    assert (result["images"], result["samples"]) == (12, 5)
    assert result["accuracy"] == pytest.approx((found == torch.tensor(LABELS)).double().mean().item())
    real, other = features[[1, 0, 2, 3, 5]].numpy(), features[[4, 7, 6, 10, 8]].numpy()
    assert result["real_frechet_distance"] == pytest.approx(frechet_distance(real, other), rel=1e-4)
    assert [row["temperature"] for row in result["judged"]] == [0.5, 1.0]
    for row in result["judged"]:
        labels = [0, 1, 0, 1, 0]
        drawn = draw(model, range(5), labels=labels, temperature=row["temperature"])
        found, features = predict(classifier, drawn)
        assert row["model"] == "generator" and row["share"] == (found == torch.tensor(labels)).double().mean().item()
        assert row["frechet_distance"] == pytest.approx(frechet_distance(features.numpy(), real), rel=1e-4)
    lines = printed.splitlines()
    assert lines[0].startswith("| model | temperature |") and len(lines) == 6
    assert lines[2].startswith(f"| `generator` | 0.5 | 1 | {100 * result['judged'][0]['share']:.1f} ± ")
    assert lines[4].startswith(f"| test images | | | {100 * result['accuracy']:.1f} ± ")


def test_each_guidance_is_judged_at_each_temperature(run, files):
    options = ("--temperatures", 0.5, 1, "--guidances", 1, 2.5)
    _, result = run("--checkpoint", "generator", "--samples", 5, *options)
    judged = [(row["temperature"], row["guidance"]) for row in result["judged"]]
    assert judged == [(0.5, 1), (0.5, 2.5), (1, 1), (1, 2.5)]
    classifier, labels = Classifier.load(files / "classifier.safetensors"), [0, 1, 0, 1, 0]
    drawn = draw(small("dmol", "class").float(), range(5), labels=labels, temperature=0.5, guidance=2.5)
    found, _ = predict(classifier, drawn)
    assert result["judged"][1]["share"] == (found == torch.tensor(labels)).double().mean().item()


def test_the_share_counts_samples_of_the_asked_class(run, monkeypatch):
    """Samples with their class in the first level, but for the fourth at temperature 0.7; read from there."""

    def fake(model, seeds, *, labels, temperature, guidance):
        drawn = pictures(len(seeds))
        for i, (seed, label) in enumerate(zip(seeds, labels)):
            drawn[i, 0, 0, 0] = 1 - label if seed == 3 and temperature == 0.7 else label
        return drawn

    def fake_predict(_, pixels):
        return pixels[:, 0, 0, 0].long(), pixels[:, 1, :2, 0].double()

    monkeypatch.setattr(judge, "draw", fake)
    monkeypatch.setattr(judge, "predict", fake_predict)
    _, result = run("--checkpoint", "generator", "--samples", 4, "--batch-size", 3)
    assert [row["share"] for row in result["judged"]] == [0.75, 1.0, 1.0, 1.0]
    assert [row["standard_error"] for row in result["judged"]] == pytest.approx([math.sqrt(0.75 * 0.25 / 4), 0, 0, 0])


@pytest.mark.parametrize("options, sentence", [
    (("--checkpoint", "upscaler"), "upscaler enlarges pictures"),
    (("--checkpoint", "plain"), "plain does not draw what the classifier knows, 8x8 pictures .* classes cat, dog"),
    (("--checkpoint", "cifar10-dmol-1d"), "cifar10-dmol-1d does not draw what"),
    (("--checkpoint", "generator", "--samples", 6), "give at most --samples 5"),
    (("--checkpoint", "generator", "--classifier", "none"), "There is no file none"),
])
def test_what_cannot_be_judged(run, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(*options)


def test_models_of_one_name_are_told_apart():
    assert judge.told_apart(["runs/a/model", "b"]) == ["model", "b"]
    assert judge.told_apart(["runs/a/model", "runs/b/model"]) == ["runs/a/model", "runs/b/model"]
    with pytest.raises(SystemExit, match=r"two models are called \.\.\./model"):
        judge.told_apart(["../a/model", "../b/model"])


@pytest.mark.parametrize("option, sentence", [
    (("--samples", 1), "--samples must be at least 2"), (("--temperatures", 0.9, 0), "from 1e-30 to 1e+30, got 0.9 0"),
    (("--guidances", 1, 21), "from 0 to 20, got 1.0 21.0"),
])
def test_options_out_of_range(run, option, sentence, capsys):
    with pytest.raises(SystemExit):
        run("--checkpoint", "generator", *option)
    assert sentence in capsys.readouterr().err
