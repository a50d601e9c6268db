"""What a training step sees of the images, and which of train.py's options reach it."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SOURCE, pictures, small, small_config
from init_fixtures import files, start  # noqa: F401, fixtures
from test_train import assert_equal, write

import data
import optimization
import run as runs
from averaging import open_model
from likelihood import Likelihood, bits_per_dim
from publishing.records import Training
from run import LABEL_DROPOUT, Run
from start import relabelled

STAND_STILL = ("--clip", 1e-30, "--weight-decay", 0)  # nothing is left of the gradient


def batch(task: str, step: int = 0, flip: bool = False, images: int = 400):
    """(pixels, labels, sources) of a step of all images, and these in the order in which it takes them."""
    all_images = data.Images(pictures(images), torch.arange(images) % 2)
    run = SimpleNamespace(
        args=SimpleNamespace(batch_size=images, seed=0, flip=flip), images=all_images, config=small_config("dmol", task),
        progress=SimpleNamespace(step=step),
        accelerator=SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu")),
    )
    return Run.batch(run), all_images[optimization.batch_indices(step, images, images, 0)]


def test_a_tenth_of_the_labels_is_no_class_other_ones_each_step():
    masks = []
    for step in range(2):
        (_, labels, _), images = batch("class", step)
        dropped = labels == 2
        assert torch.equal(labels[~dropped], images.labels[~dropped])
        assert 0.5 * LABEL_DROPOUT < dropped.float().mean() < 1.5 * LABEL_DROPOUT
        masks.append(dropped)
    assert not torch.equal(*masks)


def test_flip_mirrors_half_of_the_images_and_their_sources_with_them():
    (pixels, _, sources), images = batch("sr", flip=True)
    mirrored = (pixels != images.pixels).flatten(1).any(dim=1)
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(pixels[mirrored], images.pixels[mirrored].flip(2))  # left to right, not upside down
    assert torch.equal(sources, runs.sources_of(data.Images(pixels, None), SOURCE))
    assert torch.equal(batch("sr")[0][0], images.pixels)


def test_pictures_are_read_as_told(start, tmp_path):
    write(tmp_path / "odd.parquet", pictures(20).numpy(), column="photo", labels=False)
    small("dmol", "class").float().save_pretrained(tmp_path / "base")
    assert start("--data", tmp_path / "odd.parquet", "--image-column", "photo", init=tmp_path / "base", steps=1)["steps"] == 1


@pytest.mark.parametrize("words, share", [
    (STAND_STILL, 1.0), (("--warmup", 10**9, "--weight-decay", 0), 1.0), (("--clip", 1e-30, "--weight-decay", 100), 0.9**2),
])
def test_clip_warm_up_and_weight_decay_are_heeded(words, share, start, here, tmp_path):
    start("--data", "flat", "--learning-rate", 1e-3, *words)
    old = relabelled(open_model("base"), small_config("dmol", "unconditional"))
    for name, weight in open_model(tmp_path / "run/checkpoints/step-00000002/raw").state_dict().items():
        shrunk = share if weight.ndim == 2 and name.startswith("decoder.") else 1.0
        torch.testing.assert_close(weight, old[name] * shrunk, rtol=0, atol=1e-5)


def test_without_an_average_there_is_none(start, here, tmp_path):
    start("--data", "flat", "--ema", 0)
    last = tmp_path / "run/checkpoints/step-00000002"
    assert_equal(open_model(last / "ema").state_dict(), open_model(last / "raw").state_dict())


def test_precision_and_compilation_are_those_asked_for(start, here, monkeypatch):
    asked, compiled, forward = [], [], Likelihood.forward

    def watched(self, *batch):
        asked.append((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, *batch)

    monkeypatch.setattr(Likelihood, "forward", watched)
    monkeypatch.setattr(torch, "compile", lambda module: lambda *batch: compiled.append(1) or module(*batch))
    AcceleratorState._reset_state(reset_partial_state=True)  # of this process, which keeps its precision else
    start("--data", "flat", "--mixed-precision", "bf16", "--compile")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(compiled) == 2 and asked.count((True, True)) == 2
    asked.clear()
    start("--data", "flat", output="plain")
    assert len(compiled) == 2 and asked.count((True, False)) == 2


def test_the_loss_in_the_log_is_bits_per_dim(start, here, tmp_path):
    start("--data", "flat", "--batch-size", 18, *STAND_STILL, steps=1)
    images = data.load("flat", "train", small_config("dmol", "unconditional"))
    (first, *_) = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert first["bits_per_dim"] == pytest.approx(bits_per_dim(open_model(tmp_path / "run/model"), images[:18]), abs=1e-3)


def test_on_the_way_the_first_held_out_images_are_looked_at_and_not_charged(start, here, monkeypatch, tmp_path):
    seen = []

    def slowly(model, images):
        seen.append(len(images))
        time.sleep(1.0 if len(images) == 1 else 0.0)
        return 1.0

    monkeypatch.setattr(runs, "bits_per_dim", slowly)
    start("--data", "flat", "--validation", 4, "--validate-on", 1, steps=3)
    assert seen.count(1) == 2
    assert Training.load(tmp_path / "run/training.json").minutes * 60 < 1.0
